from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from mxd.layers import TopKAutoencoder, TopKAutoencoderConfig, Transcoder, TranscoderConfig
from mxd.models import MlpPair, ablate_mlp, capture_mlp, find_mlp, mlp_pairs, mlp_weights, num_layers, replace_mlp
from tests.test_models import IDS, build, forwards, logits, model_of, zeros


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "mixtral"])
def test_the_original_is_not_run_when_nothing_needs_it(name: str) -> None:
    model = model_of(name)
    site = find_mlp(model, 1)
    runs: list[int] = []
    linear = [m for module in site.modules for m in module.modules() if next(m.children(), None) is None]

    def note(module: nn.Module, args: object, output: object) -> None:
        runs.append(1)

    hooks = [m.register_forward_hook(note) for m in linear]
    try:
        with replace_mlp(model, {1: zeros}):
            # A mixture of experts is run once, to see whether it returns a tuple.
            logits(model) if name == "mixtral" else None
            runs.clear()
            logits(model)
            # OPT's inline parts are still called, as nothing but passages.
            assert len(runs) == (3 if name == "opt" else 0)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "gemma3"])
def test_mlp_pairs_stops_behind_the_deepest_layer(name: str) -> None:
    model = model_of(name)
    ran: list[str] = []
    paths = {module: path for path, module in model.named_modules()}

    def note(module: nn.Module, args: object, output: object) -> None:
        ran.append(paths[module])

    hooks = [module.register_forward_hook(note) for module in paths]
    try:
        pairs = mlp_pairs(model, IDS, [1], attention_mask=torch.ones_like(IDS))
    finally:
        for hook in hooks:
            hook.remove()
    assert list(pairs) == [1]
    assert not pairs[1].target.requires_grad
    assert any(".0." in path for path in ran)
    assert not any(".2." in path or "lm_head" in path for path in ran)
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 4


def test_captured_tensors_keep_their_gradients() -> None:
    model = build("falcon").requires_grad_(True)
    with capture_mlp(model, [1]) as pairs:
        model(input_ids=IDS)
    site = find_mlp(model, 1)
    pairs[1].target.sum().backward()
    assert site.modules[0].get_parameter("dense_h_to_4h.weight").grad is not None


def test_every_pass_refills_the_capture() -> None:
    model = model_of("gpt2")
    with capture_mlp(model, [0]) as pairs:
        logits(model)
        first = pairs[0]
        logits(model, IDS[:1, :3])
        assert pairs[0].x.shape == (1, 3, 32)
    assert isinstance(first, MlpPair)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "falcon", "mixtral"])
def test_contexts_nest_and_restore_after_exceptions(name: str) -> None:
    model = model_of(name)
    before, keys, modules = logits(model), list(model.state_dict()), dict(model.named_modules())
    one = torch.linspace(-1, 1, 32)

    def fail(x: Tensor) -> Tensor:
        raise KeyError("on purpose")

    def nested() -> None:
        with capture_mlp(model, [0, 1, 2]) as outside, replace_mlp(model, {1: zeros}):
            with ablate_mlp(model, {1: one}), capture_mlp(model, [1]) as inside:
                logits(model)
            assert torch.equal(outside[1].target, one.expand(2, 7, 32))
            assert torch.equal(inside[1].target, one.expand(2, 7, 32))
            logits(model)
            assert torch.equal(outside[1].target, torch.zeros(2, 7, 32))
            with replace_mlp(model, {1: find_mlp(model, 1)}):
                assert torch.equal(logits(model), before)
            with replace_mlp(model, {0: fail}):
                logits(model)

    with pytest.raises(KeyError):
        nested()
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert forwards(model) == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), before)


def test_two_layers_swap_their_mlps() -> None:
    model = model_of("llama")
    sites = {1: find_mlp(model, 2), 2: find_mlp(model, 1)}
    with replace_mlp(model, sites), capture_mlp(model, sites) as pairs:
        logits(model)
    for layer, site in sites.items():
        assert torch.equal(pairs[layer].target, site(pairs[layer].x))


def transcoder(d: int = 32) -> Transcoder:
    torch.manual_seed(1)
    return Transcoder(TranscoderConfig(d_in=d, d_out=d, num_latents=16, k=4))


def autoencoder() -> TopKAutoencoder:
    torch.manual_seed(1)
    return TopKAutoencoder(TopKAutoencoderConfig(d_in=32, num_latents=16, k=4))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon"])
def test_sparse_layers_read_the_input_or_the_output(name: str) -> None:
    model, site = model_of(name), find_mlp(model_of(name), 1)
    layers = transcoder(), autoencoder()
    for layer in layers:
        with replace_mlp(model, {1: layer}), capture_mlp(model, [1]) as pairs:
            logits(model)
        x, y = pairs[1]
        torch.testing.assert_close(y, layer(site(x) if layer.reads == "output" else x).prediction)
    with replace_mlp(model, {1: layers[0]}), replace_mlp(model, {1: layers[1]}), capture_mlp(model, [1]) as pairs:
        logits(model)
    torch.testing.assert_close(pairs[1].target, layers[1](layers[0](pairs[1].x).prediction).prediction)


@torch.no_grad()
@pytest.mark.parametrize("layer", [transcoder, autoencoder, lambda: nn.Linear(32, 32)])
def test_a_float32_layer_in_a_bfloat16_model(layer: Callable[[], nn.Module]) -> None:
    model = build("llama").to(torch.bfloat16)
    with replace_mlp(model, {1: layer()}), capture_mlp(model, [1]) as pairs:
        assert logits(model).dtype == torch.bfloat16
    assert pairs[1].target.dtype == pairs[1].x.dtype == torch.bfloat16


@torch.no_grad()
def test_under_autocast_the_replacement_returns_what_a_linear_map_would() -> None:
    model = model_of("gpt2")
    with torch.autocast("cpu", torch.bfloat16), capture_mlp(model, [1]) as pairs:
        logits(model)
        expected = pairs[1].target.dtype
        with replace_mlp(model, {1: zeros}):
            logits(model)
    assert pairs[1].target.dtype == expected == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gemma3"])
def test_passthrough_keeps_the_original_at_these_tokens(name: str) -> None:
    model, site = model_of(name), find_mlp(model_of(name), 1)
    special = {int(IDS[0, 0]), int(IDS[1, 3])}
    mask = torch.isin(IDS, torch.tensor(sorted(special)))
    with replace_mlp(model, {1: zeros}, passthrough=special), capture_mlp(model, [1]) as pairs:
        logits(model)
        x, y = pairs[1]
        torch.testing.assert_close(y[mask], site(x)[mask])
        assert not y[~mask].any()
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 2, 32))
        # With a key-value cache a forward pass has the new tokens only.
        cached = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        model(input_ids=IDS[:1, :1].expand(2, 1), past_key_values=cached, use_cache=True)
        assert pairs[1].target.any()
        model(input_ids=torch.full((2, 1), 2), past_key_values=cached, use_cache=True)
        assert not pairs[1].target.any()


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class OddMlp(nn.Module):
    """Returns something beside its output, like the mixtures of experts that also return their routing."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.act = Squared()
        self.runs = 0

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        self.runs += 1
        return self.w2(self.act(self.w1(x)) * self.w3(x)), "routing"


class OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"ff": OddMlp(), "unused": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            output, routing = layer.get_submodule("ff")(hidden)
            assert routing == "routing"
            hidden = hidden + output
        return hidden


def test_a_family_that_is_not_listed() -> None:
    model, path = OddModel(), "layers.{layer}.ff"
    site = find_mlp(model, 1, path)
    assert (site.d_in, site.d_hidden, site.d_out, site.activation, site.gated) == (8, 12, 8, None, True)
    before = model(IDS)
    pairs = mlp_pairs(model, IDS, [0, 1], module_path=path)
    assert torch.equal(pairs[1].target, site(pairs[1].x))
    with replace_mlp(model, {1: site}, module_path=path):
        assert torch.equal(model(IDS), before)
    with replace_mlp(model, {0: zeros, 1: zeros}, module_path=path):
        assert torch.equal(model(IDS), model.embed(IDS))
    with pytest.raises(ValueError, match=r"did not run that of layers \[0\]"):
        mlp_pairs(model, IDS, [0], module_path="layers.{layer}.unused")
    with pytest.raises(ValueError, match="num_hidden_layers"):
        num_layers(model)


def test_blocks_may_be_named_in_any_way() -> None:
    model = nn.ModuleDict({"block_0": nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))})
    site = find_mlp(model, 0, "block_{layer}")
    assert (site.d_in, site.d_hidden, site.d_out, site.activation, site.gated) == (8, 12, 6, "relu", False)
    with pytest.raises(ValueError, match=r"'ModuleDict' has no 'block_1' .*there is: block_0"):
        find_mlp(model, 1, "block_{layer}")


def test_a_listed_family_accepts_a_path() -> None:
    model = model_of("bloom")
    assert find_mlp(model, 1, "transformer.h.{layer}.mlp") == find_mlp(model, 1)
    assert find_mlp(model, 1, "transformer.h.{layer}.self_attention.dense").d_hidden == 128


@pytest.mark.parametrize(
    ("name", "part", "widths"),
    [("gpt2", "c_fc", (32, 128)), ("gpt2", "c_proj", (128, 32)), ("llama", "up_proj", (32, 48))],
)
def test_a_linear_layer_is_as_wide_as_it_is(name: str, part: str, widths: tuple[int, int]) -> None:
    model = model_of(name)
    path = find_mlp(model, 1).path.replace(".1.", ".{layer}.") + f".{part}"
    site = find_mlp(model, 1, path)
    assert (site.d_in, site.d_out, site.gated) == (*widths, False)
    pair = mlp_pairs(model, IDS, [1], module_path=path)[1]
    assert (pair.x.shape[-1], pair.target.shape[-1]) == widths
    torch.manual_seed(1)
    layer = Transcoder(TranscoderConfig(d_in=site.d_in, d_out=site.d_out, num_latents=16, k=4))
    with torch.no_grad(), replace_mlp(model, {1: layer}, module_path=path), capture_mlp(model, [1], path) as pairs:
        logits(model)
        torch.testing.assert_close(pairs[1].target, layer(pairs[1].x).prediction)


def test_widths_that_do_not_show_are_said_when_they_are_seen() -> None:
    model, path = model_of("llama"), "model.layers.{layer}.mlp.act_fn"
    message = r"'model\.layers\.1\.mlp\.act_fn' is given vectors 48 wide, where .* say 32\. Give the path of a module"
    with pytest.raises(ValueError, match=message):
        mlp_pairs(model, IDS, [1], module_path=path)
    with replace_mlp(model, {1: zeros}, module_path=path), pytest.raises(ValueError, match=message):
        logits(model)
    assert forwards(model) == []


def test_dense_blocks_beside_mixtures_of_experts() -> None:
    model = model_of("deepseek_v3")
    dense, mixture = find_mlp(model, 0), find_mlp(model, 1)
    assert (dense.d_hidden, mixture.d_hidden) == (48, 2 * 20 + 20)
    assert mlp_weights(dense).W_enc.shape == (32, 48)
    with pytest.raises(ValueError, match="must be dense linear maps"):
        mlp_weights(mixture)
    experts = "model.layers.{layer}.mlp.experts"
    message = r"Blocks 1-2 are mixtures of experts, 0 are dense: give .* 'model\.layers\.\{layer\}\.mlp'"
    with pytest.raises(ValueError, match=message):
        find_mlp(model, 1, experts)
    with pytest.raises(ValueError, match="has no 'experts'"):
        find_mlp(model, 0, experts)
    shared = "model.layers.{layer}.mlp.shared_experts"
    assert mlp_pairs(model, IDS, [1], module_path=shared)[1].x.shape == (2, 7, 32)


def test_models_that_read_both_ways_are_refused_as_such() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    encoder = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **sizes))
    with pytest.raises(ValueError, match=r"must be causal.*both directions \(model_type bert\)"):
        find_mlp(encoder, 0)
    decoder = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", is_decoder=True, **sizes))
    with pytest.raises(ValueError, match="must be of a family"):
        find_mlp(decoder, 0)


def enter(context: AbstractContextManager[object]) -> None:
    with context:
        pass


FAILURES: list[tuple[Callable[[nn.Module], object], str]] = [
    (lambda _: find_mlp(OddModel(), 0), r"family .*'OddModel'.*--module .*'layers\.\{layer\}\.ff'"),
    (lambda m: find_mlp(m, 3), r"must lie in \[0, 2\], the 3 blocks of GPT2LMHeadModel; got 3"),
    (lambda m: find_mlp(m, -1), r"got -1"),
    (lambda m: find_mlp(m, 0, "transformer.h.0.mlp"), r"must contain '\{layer\}'"),
    (lambda m: find_mlp(m, 0, "transformer.x.{layer}.mlp"), r"'transformer' has no 'x' .*there is: wte, wpe, drop, h"),
    (lambda m: find_mlp(m, 0, "transformer.h.{layer}.ff"), r"'transformer\.h\.0' has no 'ff' .*there is: ln_1, attn"),
    (lambda m: mlp_pairs(m, IDS, []), "At least one layer"),
    (lambda m: enter(replace_mlp(m, {1: transcoder(16)})), r"\(32, 32\); got \(16, 16\)"),
    (lambda m: enter(ablate_mlp(m, {1: torch.zeros(3)})), r"shape \(32,\).* got \(3,\)"),
]


@pytest.mark.parametrize(("call", "message"), FAILURES)
def test_errors_say_what_to_do(call: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model_of("gpt2"))


def narrowed(x: Tensor) -> Tensor:
    return x[..., :3]


def test_errors_in_the_forward_pass() -> None:
    model = model_of("gpt2")
    with replace_mlp(model, {1: narrowed}), pytest.raises(ValueError, match=r"shape \(2, 7, 32\).*transfo"):
        logits(model)
    base = model.get_submodule("transformer")
    with replace_mlp(model, {1: zeros}, passthrough=[0]):
        logits(model)
        with pytest.raises(ValueError, match="Call the whole model"):
            base(input_ids=IDS)
    assert forwards(model) == []


def test_an_ablated_mlp_stays_at_positions_that_pass_through() -> None:
    model, ids = model_of("llama"), torch.tensor([[1, 5, 6, 1, 7]])
    own = mlp_pairs(model, ids, [1])[1].target
    with ablate_mlp(model, {1: None}, passthrough=[1]), capture_mlp(model, [1]) as pairs:
        model(ids)
    assert torch.equal(pairs[1].target, torch.where((ids == 1)[..., None], own, 0))
