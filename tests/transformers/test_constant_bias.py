"""Models that add a bias over the vocabulary beside their head stay fused: it is a bias of the loss."""

from __future__ import annotations

import copy
import operator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from liger_kernel.transformers.patching import heads
from tests.transformers.steps import in_float64, named_step
from tests.transformers.tiny import VOCAB, batch, randomize

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")
SEQ2SEQ = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCAB),
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id", "bos_token_id"), 1),
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "attention_window": 8,
}
ESM = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "mask_token_id": 3,
    "position_embedding_type": "rotary",
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    "token_dropout": False,
}
BARTS = ["bart", "blenderbot", "led", "marian", "mbart", "pegasus", "plbart"]


def build(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    kind, options = (
        (AutoModelForMaskedLM, ESM) if model_type == "esm" else (AutoModelForSeq2SeqLM, SEQ2SEQ)
    )
    model = randomize(kind.from_config(AutoConfig.for_model(model_type, **options)))
    if model_type != "esm":  # zeros until somebody sets it
        model.final_logits_bias = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    return model.to(dtype)


def inputs(model_type: str, seed: int) -> dict[str, Tensor]:
    drawn = batch(length=16, seed=seed)
    return drawn if model_type != "led" else drawn | {"global_attention_mask": drawn["labels"] * 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [*BARTS, "esm"])
def test_the_loss_is_fused_and_the_same(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, high, low = (build(model_type, d) for d in (dtype, torch.float64, dtype))
    high.load_state_dict(model.state_dict())
    try:
        in_float64(partial(named_step, high, inputs(model_type, 0)))
    except RuntimeError as error:  # LED of transformers 4.57
        pytest.skip(f"does not run in float64: {error}")
    liger_kernel.patch(model)
    monkeypatch.setattr(heads, "logits_of", lambda *_: pytest.fail("real logits were made"))

    def draw(seed: int) -> Any:
        ours, exact, eager = (
            partial(named_step, m, inputs(model_type, seed)) for m in (model, high, low)
        )
        return [ours(), in_float64(exact), eager()]

    assert_draws_no_worse(draw, first=4)


@pytest.mark.parametrize("model_type", ["bart", "esm"])
def test_logits_are_those_of_the_model(model_type: str) -> None:
    patched, stock = build(model_type).train(), build(model_type).train()
    liger_kernel.patch(patched, logits="lazy")
    given = inputs(model_type, 0)
    torch.testing.assert_close(patched(**given).logits, stock(**given).logits)


class Odd(nn.Module):
    """A model of tensors, whose forward does `then` to its logits."""

    def __init__(self, then: Any):
        super().__init__()
        self.body, self.lm_head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.config, self.then = SimpleNamespace(vocab_size=VOCAB), then

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.then(self.lm_head(self.body(input_ids)))
        loss = nn.functional.cross_entropy(
            logits.float().view(-1, logits.shape[-1]), labels.view(-1)
        )
        return {"loss": loss}


BIAS = torch.linspace(-2, 2, VOCAB)
THEN = {
    "beside the bias of the head": (True, lambda t: t + BIAS),
    "of one row": (True, lambda t: t + BIAS[None]),
    "of three dimensions": (True, lambda t: t + BIAS[None, None]),
    "in place": (True, lambda t: operator.iadd(t, BIAS)),
    "after a scale": (True, lambda t: t * 0.5 + BIAS),
    "before a scale": (True, lambda t: (t + BIAS) / 2.0),
    "before a soft cap": (True, lambda t: 3.0 * torch.tanh((t + BIAS) / 3.0)),
    "before a slice of the classes": (True, lambda t: (t + BIAS)[..., : VOCAB - 4]),
    "after a soft cap": (False, lambda t: 3.0 * torch.tanh(t / 3.0) + BIAS),
    "after a slice of the classes": (False, lambda t: t[..., : VOCAB - 4] + BIAS[: VOCAB - 4]),
    "twice": (False, lambda t: t + BIAS + BIAS),
    "a number": (False, lambda t: t + 1.0),
    "from the left": (False, lambda t: BIAS + t),
    "integers": (False, lambda t: t + torch.arange(VOCAB)),
    "of tokens": (False, lambda t: t + torch.ones(t.shape[:-1]).unsqueeze(-1)),
    "of everything": (False, lambda t: t + torch.ones(t.shape)),
    "with a factor": (False, lambda t: torch.add(t, BIAS, alpha=2)),
}


@pytest.mark.parametrize("how", THEN)
def test_every_way_to_add(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuses, then = THEN[how]
    made: list[int] = []
    original = heads.logits_of
    monkeypatch.setattr(heads, "logits_of", lambda *a: (made.append(1), original(*a))[1])
    torch.manual_seed(0)
    stock = Odd(then).train()
    patched = copy.deepcopy(stock)
    liger_kernel.patch(patched)
    ids = torch.randint(VOCAB - 4, (2, 9))
    found, expected = (model(input_ids=ids, labels=ids) for model in (patched, stock))
    for output in (found, expected):
        output["loss"].backward()
    assert bool(made) != fuses
    torch.testing.assert_close(found["loss"], expected["loss"])
    for (name, p), q in zip(patched.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    model = build("esm").train()
    liger_kernel.patch(model)
    model.requires_grad_(False)
    model.lm_head.bias.requires_grad_()
    model(**inputs("esm", 0)).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["lm_head.bias"]
    assert model.lm_head.bias.grad.any()


def trained(model: Any) -> None:
    torch.optim.AdamW([model.lm_head.bias], lr=1.0, fused=True).step()


def set_anew(model: Any) -> None:
    model.final_logits_bias += 1.0


@pytest.mark.parametrize(("model_type", "change"), [("bart", set_anew), ("esm", trained)])
def test_logits_need_the_bias_of_the_forward(model_type: str, change: Any) -> None:
    """The weight of the head is what it was."""
    model = build(model_type).train()
    liger_kernel.patch(model)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.bias" or model_type == "bart")
    outputs = model(**inputs(model_type, 0))
    outputs.loss.backward()
    change(model)
    with pytest.raises(RuntimeError, match='logits="real"'):
        _ = outputs.logits


@pytest.mark.parametrize("how", [how for how, (fuses, _) in THEN.items() if fuses])
def test_compiled(how: str) -> None:
    torch.manual_seed(0)
    model = Odd(THEN[how][1]).train()
    liger_kernel.patch(model)
    ids = torch.randint(VOCAB - 4, (2, 9))
    expected = model(input_ids=ids, labels=ids)["loss"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids)["loss"], expected)
