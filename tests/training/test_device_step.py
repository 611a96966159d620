"""The head of a training step never makes the host wait for the device. `make gpu-check` runs this on a GPU, where a
wait is an error; elsewhere the same code runs without that check."""

import contextlib

import torch

from selsft.trainer import _count
from selsft.training.collator import DataCollatorForSelectiveSFT
from selsft.training.head import SelectiveHead, _selective_loss, read_lm_head
from tests.support import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def no_waiting():
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_head_of_a_step_does_not_wait():
    data = tiny.tokenised_data(4, token_weights=lambda i, row: [(-1.0) ** t for t in range(len(row))])
    batch = DataCollatorForSelectiveSFT(pad_token_id=0)(list(data))
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    model = tiny.llama().to(DEVICE)
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    for _ in range(2):  # the first round compiles kernels and loads libraries, which may wait
        weight = read_lm_head(model.get_output_embeddings())
        with no_waiting() if _ else contextlib.nullcontext():
            positives, negatives = _count(batch["token_weights"])
            weights = torch.where(batch["token_weights"] < 0, batch["token_weights"] * 0.3, batch["token_weights"])
            head = SelectiveHead(weights, batch["active_rows"])
            output = _selective_loss(head, hidden, weight, batch["labels"][:, 1:], weight.keywords(model))
            (output.loss / (positives + negatives)).backward(retain_graph=True)
    assert output.stats is not None and output.stats.tolist()[1] == positives.item()
    assert model.lm_head.weight.grad.abs().sum() > 0
