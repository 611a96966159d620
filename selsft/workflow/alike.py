"""What trainings must share to be compared as arms, and what they may be called."""

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
# What arms share, or there would be nothing to compare
SHARED = {
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "packing", "padding_free", "train_sampling_strategy", "model_init_kwargs",
}  # fmt: skip
SET_HERE = {"output_dir", "seed", "data_seed"}
