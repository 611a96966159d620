"""Columns read from hidden states in the forward pass that scores: aligned with their tokens."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from selsft import DataCollatorForSelectiveSFT, SelectiveSFTConfig
from selsft.data.chunks import token_chunks
from selsft.data.scored_folder import ScoredFolder
from selsft.scoring.frozen import FrozenModels, StateColumns
from selsft.scoring.logprobs import ROW_COLUMNS, hidden_states
from tests.support import tiny


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe", "lora"])
def test_states_are_those_of_the_model(name):
    model = get_peft_model(tiny.llama(), LoraConfig(r=2)) if name == "lora" else tiny.build(name)
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
        with hidden_states(model, [0, 1]) as states:
            model(input_ids=ids)
            assert set(states) == {0, 1}
            for layer, state in states.items():
                torch.testing.assert_close(state, wanted[layer], rtol=0, atol=1e-6)
            model(input_ids=ids[:1])
            assert states[1].shape == (1, 4, 32)
        model(input_ids=ids)
        assert states[1].shape == (1, 4, 32)  # the hooks are gone
    with pytest.raises(ValueError, match=r"layers=\[7\]: the model has the layers 0 \(embeddings\) to 2"):
        with hidden_states(model, [1, 7]):
            pass


def test_a_column_of_states_needs_no_reference_and_no_second_pass(options, tmp_path):
    model = tiny.llama()
    args = SelectiveSFTConfig(**{**options, "scoring_batch_tokens": 40})
    more = StateColumns(
        ["norm", "logp_2"], [1], lambda states, logps, inputs: {"norm": states[1].norm(dim=-1), "logp_2": logps}
    )
    models = FrozenModels(
        model, None, tiny.tokenizer(), args, Accelerator(cpu=True), DataCollatorForSelectiveSFT(pad_token_id=0),
        state_columns=more,
    )  # fmt: skip
    (chunk,) = token_chunks(tiny.tokenised_data(12), ROW_COLUMNS)
    with models.ready():
        found = models.score(chunk, models.columns)
    assert list(found) == ["base_logps", "norm", "logp_2"]
    assert np.array_equal(found["base_logps"], found["logp_2"])
    ends = np.cumsum(chunk.lengths)
    for start, end in zip(ends - chunk.lengths, ends, strict=True):
        ids = torch.from_numpy(chunk.columns["input_ids"][start:end].astype(np.int64))[None]
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        np.testing.assert_allclose(found["norm"][start:end], states.norm(dim=-1).numpy(), rtol=1e-5)
    store = ScoredFolder(tmp_path / "scored", {})
    store.open({})
    store.write(0, chunk, found)
    assert all(np.array_equal(values, found[name]) for name, values in store.read(0).items())
