"""Results to make reports from. The numbers have the size of a real run on a small model; the curves are drawn."""

import math

from megaqad.report import Column, Curve, LayerError, RunFacts, RunResults, StepRow, ValidationRow, Verification


def curve(start: float, end: float, steps: int = 300, entropy: float = 1.32) -> Curve:
    rows = tuple(
        StepRow(
            step=step,
            loss=end + (start - end) * math.exp(-step / 60) + 0.04 * start * math.sin(12.9898 * step * step),
            grad_norm=0.05 + 0.1 * math.exp(-step / 30) + 0.01 * math.sin(78.233 * step),
        )
        for step in range(1, steps + 1)
    )
    held_out = tuple(
        ValidationRow(step=row.step, kl_to_teacher=row.loss, cross_entropy=entropy) for row in rows[49::50]
    )
    return Curve(rows, held_out)


def layer_errors(layers: int = 4) -> tuple[LayerError, ...]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    rows = []
    for layer in range(layers):
        place = f"model.layers.{layer}."
        fused = ", ".join(place + kind for kind in kinds)
        gate = f"{place}mlp.gate_proj, {place}mlp.up_proj"
        for number, name in enumerate((fused, place + "self_attn.o_proj", gate, place + "mlp.down_proj")):
            error = 0.093 + 0.002 * math.sin(5 * layer + 3 * number) + 0.001 * layer
            rows.append(LayerError(module=name, relative_error=error, bits=4.5))
    return (*rows, LayerError(module="lm_head", relative_error=0.0, bits=16))


FACTS = RunFacts(
    model="teacher",
    parameters=2_361_024,
    data="stdlib: 2,849,782 training tokens of 448 files, 98,766 held-out tokens of 25 other files",
    layout="tensor 2 x pipeline 2, data 1",
    recipe="nvfp4: W4A4 in every linear layer, lm_head BF16",
    steps=300,
    tokens=300 * 4096,
    seconds=161.4,
    command="megaqad demo train.steps=300 parallel.tensor=2 parallel.pipeline=2",
    versions={"megaqad": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1"},
    verification=Verification(passed=True, summary="largest logit difference 1.9e-06 over 2,048 tokens, 28 tensors"),
)


def column(kl: float, entropy: float, agreement: float, tokens: int = 98_765) -> Column:
    return Column(kl_to_teacher=kl, cross_entropy=entropy, top1_agreement=agreement, tokens=tokens)


BF16 = column(0.0, 1.315231, 1.0)
PTQ = column(0.0125339, 1.325127, 0.938812)
QAT = column(0.0269072, 1.320166, 0.912345)
QAD = column(0.0086118, 1.322044, 0.950021)


def results(**changes) -> RunResults:
    everything = {
        "bf16": BF16,
        "ptq": PTQ,
        "qat": QAT,
        "qad": QAD,
        "facts": FACTS,
        "qad_curve": curve(0.0125, 0.0086),
        "qat_curve": curve(1.345, 1.302),
        "layer_errors": layer_errors(),
    }
    return RunResults(**(everything | changes))
