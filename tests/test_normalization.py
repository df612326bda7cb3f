import pytest
import torch

from mxd.metrics import error_sums
from mxd.training.normalization import fold_input_normalization_, input_normalization
from tests.test_optimizer import D, layer_of


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip-transcoder"])
def test_a_folded_normalization_does_on_plain_inputs_what_was_trained_on_normalised_ones(kind: str) -> None:
    layer, x = layer_of(kind).double(), 3 * torch.randn(50, D, dtype=torch.float64) + 5
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    normalization = input_normalization(error_sums(x, x))
    torch.testing.assert_close(normalization(x).mean(0), torch.zeros(D).double(), atol=1e-5, rtol=0)
    assert float(normalization(x).square().mean()) == pytest.approx(1, rel=1e-5)
    expected = layer(normalization(x)).prediction
    fold_input_normalization_(layer, normalization)
    torch.testing.assert_close(layer(x).prediction, expected, rtol=1e-5, atol=1e-5)
    fold_input_normalization_(layer, normalization.inverse())
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5)


def test_inputs_that_do_not_vary_are_refused() -> None:
    for seed in range(5):
        x = torch.randn(1, D, generator=torch.Generator().manual_seed(seed)).expand(4099, D)
        with pytest.raises(ValueError, match="inputs must vary and be finite to be normalised"):
            input_normalization(error_sums(x, x))
