"""MM1's learning-rate law against the paper's figures, the schedule, and the parameter count behind the law."""

import pytest

from megatron_mm.config import DecoderConfig, config_from_dict
from megatron_mm.training.optimizer import mm1_learning_rate, non_embedding_parameters, peak_learning_rates, schedule
from tests.parallel.recipes import MODEL


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (9e6, 6.75e-4),
        (85e6, 2.62e-4),
        (302e6, 1.54e-4),
        (1.2e9, 8.6e-5),
        (2.9e9, 5.92e-5),
        (6.4e9, 4.24e-5),
        (30e9, 2.21e-5),
    ],
)
def test_law_gives_the_papers_rates(parameters: float, expected: float) -> None:
    assert mm1_learning_rate(parameters) == pytest.approx(expected, rel=0.005)


def test_non_embedding_parameters_are_those_of_the_layers() -> None:
    """12·L·d² where the FFN's three matrices hold 8·d² and attention has as many key as query heads."""
    decoder = DecoderConfig(
        num_layers=24, hidden_size=2048, num_attention_heads=16, num_query_groups=16, ffn_hidden_size=2048 * 8 // 3,
        vocab_size=32000,
    )  # fmt: skip
    assert non_embedding_parameters(decoder) == pytest.approx(12 * 24 * 2048**2, rel=1e-3)


def config(**optimizer: object):
    return config_from_dict(
        {
            "run_dir": "run",
            "model": MODEL,
            "data": {"tokenizer": "t", "sources": [{"path": "s", "weight": 1}], "seq_length": 48},
            "training": {"steps": 101},
            "optimizer": optimizer,
        }
    )


def test_schedule_warms_up_and_ends_at_the_minimum() -> None:
    c = config(warmup_steps=10, min_lr_ratio=0.1)
    assert schedule(c, 0) == pytest.approx(0.1)
    assert schedule(c, 9) == pytest.approx(1.0)
    assert schedule(c, 10) == pytest.approx(1.0)
    assert schedule(c, 55) == pytest.approx(0.55)  # half way down
    assert schedule(c, 100) == pytest.approx(0.1)
    assert schedule(c, 10**6) == pytest.approx(0.1)
    values = [schedule(c, s) for s in range(10, 101)]
    assert values == sorted(values, reverse=True)


def test_peaks() -> None:
    n = non_embedding_parameters(config().model.decoder)
    assert peak_learning_rates(config()) == (mm1_learning_rate(n), 8e-5)
    assert peak_learning_rates(config(lr=1e-3, connector_lr=None)) == (1e-3, 1e-3)
