#!/bin/bash
# Training on several nodes under SLURM, with torch's elastic launcher; accelerate finds its settings in the environment.
#
#   sbatch --nodes 2 --gpus-per-node 8 slurm.sh recipe.yaml runs/forget
#
# Model, data, output folder and this environment are on storage that all nodes see. A requeued job resumes from its
# last checkpoint (set save_strategy: steps in the recipe). Scores are computed once and cached on each node, or
# beforehand with `selsft score`, whose folder is the data then.
#SBATCH --job-name selsft
#SBATCH --ntasks-per-node 1
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail

recipe=$1 output=$2
shift 2
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*} # not `| head`, which breaks the pipe
resume=()
if compgen -G "$output/checkpoint-*" > /dev/null; then
    resume=(--resume_from_checkpoint true)
fi

# One task on each node starts the processes of that node. A lost node ends the job, which is queued again: with
# --max_restarts the processes would begin anew, without the flag to resume
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_PER_NODE:-1}" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${PORT:-29500}" \
    -m selsft.cli train --config "$recipe" --output_dir "$output" "${resume[@]}" "$@"
