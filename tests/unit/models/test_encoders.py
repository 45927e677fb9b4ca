"""Frozen encoders: real formats, no network, nothing silently missing."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deco_scale.errors import ConfigError
from deco_scale.models import compile as block_compile
from deco_scale.models import frozen
from deco_scale.models.config import ImageEncoderConfig, TextEncoderConfig, is_on
from deco_scale.models.encoders import (
    ImageEncoder,
    TextEncoder,
    dinov2_from_original,
    text_identity,
)
from tests.support.assets import TEXT_DIM, TEXT_TOKENS

CPU = torch.device("cpu")


def load_text(folder: Path, cache: int = 0) -> TextEncoder:
    cfg = TextEncoderConfig(path=str(folder), max_tokens=TEXT_TOKENS, cache_captions=cache)
    return TextEncoder.load(cfg, CPU)


def test_null_embedding_is_that_of_the_empty_caption_and_cannot_be_changed(text_encoder: Path) -> None:
    encoder = load_text(text_encoder)
    null = encoder.null
    assert null.shape == (TEXT_TOKENS, TEXT_DIM) and bool(null.isfinite().all())
    encoder.null.zero_()
    encoder.encode(["a red square", "not this"])
    torch.testing.assert_close(encoder.encode([""])[0], null, rtol=1e-5, atol=1e-6)
    assert torch.equal(encoder.null, null)


def test_embeddings_have_fixed_length_and_right_padding(text_encoder: Path) -> None:
    encoder = load_text(text_encoder)
    short, long = encoder.encode(["a red square", "a red square on the white ground a a a a"])
    assert short.shape == long.shape == (TEXT_TOKENS, TEXT_DIM)
    # Causal and padded on the right: the shared first words have the same states.
    torch.testing.assert_close(short[:3], long[:3], rtol=1e-4, atol=1e-5)


def test_caching_does_not_change_embeddings(text_encoder: Path) -> None:
    plain, cached = load_text(text_encoder), load_text(text_encoder, cache=2)
    for captions in (["a red", "a blue"], ["a blue", "a green", "a red"], ["a red"]):
        torch.testing.assert_close(plain.encode(captions), cached.encode(captions))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_mask_equals_that_of_transformers(causal: bool, text_encoder: Path) -> None:
    from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["intermediate_size"] = 48
    torch.manual_seed(0)
    grouped = {"num_key_value_heads": 1, "head_dim": 16}
    model = Qwen3Model(Qwen3Config(**sizes, **grouped)) if causal else BertModel(BertConfig(**sizes))
    # Of three texts the last is empty: every token is padding.
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6])
    ids = torch.randint(0, 99, mask.shape)

    def tokens(texts: list[str], **options: object) -> dict[str, torch.Tensor]:
        rows = [int(text or 2) for text in texts]
        return {"input_ids": ids[rows], "attention_mask": mask[rows]}

    encoder = TextEncoder(model, tokens, TextEncoderConfig(path="made", max_tokens=6), CPU)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert encoder._causal is causal and expected.isfinite().all()
    assert torch.equal(encoder.encode(["0", "1", "2"]), expected)


def test_attention_of_another_kind_is_left_to_transformers(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertModel._from_config(BertConfig(vocab_size=99, **sizes), attn_implementation="eager")
    ids, mask = torch.ones(1, 6, dtype=torch.int64), torch.tensor([[1, 1, 1, 0, 0, 0]])
    cfg = TextEncoderConfig(path="made", max_tokens=6)
    encoder = TextEncoder(model, lambda texts, **options: {"input_ids": ids, "attention_mask": mask}, cfg, CPU)
    assert "BertModel: transformers builds its attention mask" in caplog.text
    with torch.no_grad():
        assert torch.equal(encoder.encode(["x"]), model(input_ids=ids, attention_mask=mask).last_hidden_state)


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES["intermediate_size"] = 48


def made(causal: bool, **settings: Any) -> TextEncoder:
    """An encoder with random weights, at most 80 tokens, for texts that are a number of tokens."""
    from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    grouped = {"num_key_value_heads": 1, "head_dim": 16}
    kind, config = (Qwen3Model, Qwen3Config(**SIZES, **grouped)) if causal else (BertModel, BertConfig(**SIZES))
    cfg = TextEncoderConfig(path="made", max_tokens=80, **settings)
    model = kind._from_config(config, dtype=frozen.weight_dtype(cfg.precision, CPU))
    ids = torch.randint(0, 99, (80,))

    def tokens(texts: list[str], **options: object) -> dict[str, torch.Tensor]:
        counts = torch.tensor([[int(text or 0)] for text in texts])
        return {"input_ids": ids.repeat(len(texts), 1), "attention_mask": (torch.arange(80) < counts).long()}

    return TextEncoder(model, tokens, cfg, CPU)


@pytest.mark.parametrize("causal", [True, False])
def test_only_what_a_batch_needs_is_encoded_with_zero_padding(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, full = made(causal, zero_padding=True), made(causal)
    calls: list[tuple[int, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append((query.shape[2], options.get("attn_mask") is None))
        return attend(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for texts, length in ((["3", "20", ""], 32), (["33"], 64), (["80", "1"], 80)):
        expected, keep = full.encode(texts), torch.tensor([[int(text or 0)] for text in texts]) > torch.arange(80)
        calls.clear()
        states = short.encode(texts)
        # Padding never reaches a token of a causal encoder, so that it needs no mask.
        assert calls == [(length, causal)] * 2
        torch.testing.assert_close(states, expected * keep[..., None], rtol=1e-5, atol=1e-5)
        assert [len(each) for each in short.encode_ragged(texts)] == [int(text or 0) for text in texts]
    assert short.null.shape == (80, 32) and not short.null.any()


def test_on_a_gpu_encoders_run_ahead_compiled_in_bf16() -> None:
    for cfg in (TextEncoderConfig(path="made"), ImageEncoderConfig(path="made")):
        assert is_on(cfg.ahead, "cuda") and is_on(cfg.compile, "cuda")
        assert not is_on(cfg.ahead, "cpu") and not is_on(cfg.compile, "cpu")
        assert frozen.weight_dtype(cfg.precision, torch.device("cuda")) == torch.bfloat16
        assert frozen.weight_dtype(cfg.precision, CPU) == torch.float32
    assert is_on(True, "cpu") and not is_on(False, "cuda")


def test_bf16_rounds_weights_and_keeps_rotary_frequencies(text_encoder: Path, image_encoder: Path) -> None:
    cfg = TextEncoderConfig(path=str(text_encoder), max_tokens=TEXT_TOKENS, precision="bf16")
    encoder, exact = TextEncoder.load(cfg, CPU), load_text(text_encoder)
    module = encoder.model.module
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.rotary_emb.inv_freq.dtype == torch.float32
    texts = ["a red square", "a photo of the circle on white ground"]
    torch.testing.assert_close(encoder.encode(texts), exact.encode(texts), rtol=0.05, atol=0.05)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        settings = ImageEncoderConfig(path=str(image_encoder), precision=precision)
        assert ImageEncoder.load(settings, CPU).encode(image).dtype == dtype


class CountedGraphs(list[torch.fx.GraphModule]):
    """A compiler that runs graphs as they are and keeps them."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.append(graph)
        return graph.forward


def test_layers_share_one_graph_per_shape_and_other_batches_stay_eager(image_encoder: Path) -> None:
    graphs = CountedGraphs()
    text = made(True, zero_padding=True)
    image = ImageEncoder.load(ImageEncoderConfig(path=str(image_encoder)), CPU)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    # Texts, and the number of graphs from then on.
    cases = ((["3", "20"], 1), (["5", "7"], 1), (["5"], 1), (["40", "7"], 2), (["", "1", "2"], 2))
    expected = [text.encode(texts) for texts, _ in cases], image.encode(images)
    text.model.compile([2], backend=graphs)
    for (texts, count), states in zip(cases, expected[0], strict=True):
        torch.testing.assert_close(text.encode(texts), states)
        assert len(graphs) == count
    image.model.compile([2], backend=graphs)
    torch.testing.assert_close(image.encode(images), expected[1])
    assert len(graphs) == 3


def test_an_encoder_that_cannot_be_compiled_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    encoder = made(True)
    expected = encoder.encode(["3"])

    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        raise ValueError("no compiler here")

    encoder.model.compile([1], backend=broken)
    for _ in range(2):
        assert torch.equal(encoder.encode(["3"]), expected)
    (record,) = [r for r in caplog.records if r.name == frozen.__name__]
    assert "fallback: Qwen3Model runs uncompiled" in record.message and "no compiler here" in record.message


def test_an_encoder_with_too_many_shapes_runs_eagerly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, image_encoder: Path
) -> None:
    monkeypatch.setattr(block_compile, "RECOMPILE_LIMIT", 2)
    torch._dynamo.reset()
    encoder = ImageEncoder.load(ImageEncoderConfig(path=str(image_encoder)), CPU)
    images = [torch.rand(1, 3, 32, width) * 2 - 1 for width in (16, 32, 48, 64)]
    expected = [encoder.encode(image) for image in images]
    config: Any = torch._dynamo.config
    kept = {name: getattr(config, name) for name in ("recompile_limit", "fail_on_recompile_limit_hit")}
    with config.patch(**kept):
        encoder.model.compile([1], backend="eager")
        for image, states in zip(images, expected, strict=True):
            torch.testing.assert_close(encoder.encode(image), states)
    (record,) = [r for r in caplog.records if r.name == frozen.__name__]
    assert "fallback: Dinov2Model runs uncompiled" in record.message


def test_fp8_rounds_the_linears_of_the_layers(monkeypatch: pytest.MonkeyPatch, text_encoder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    exact, graphs = made(True, precision="bf16"), CountedGraphs()
    # A CPU multiplies FP8 matrices as well, slowly.
    monkeypatch.setattr(frozen, "has_fp8", lambda device: True)
    monkeypatch.setattr(quantization.quant_api, "_check_hardware_support", lambda granularity: None)
    encoder = made(True, precision="fp8")
    layer = encoder.model.module.layers[0]
    assert type(layer.mlp.up_proj.weight).__name__ == "Float8Tensor"
    states, expected = encoder.encode(["20", "9"]), exact.encode(["20", "9"])
    assert 1e-3 < (states - expected).norm() / expected.norm() < 0.15
    encoder.model.compile([2], backend=graphs)
    torch.testing.assert_close(encoder.encode(["20", "9"]), states)
    assert len(graphs) == 1
    # Embeddings of another precision are those of another encoder.
    of = {p: TextEncoderConfig(path=str(text_encoder), precision=p) for p in ("bf16", "fp8")}
    names = [text_identity(cfg, 24)["encoder"] for cfg in of.values()]
    assert names == [text_encoder.name, f"{text_encoder.name} in fp8"]


def test_fp8_that_is_not_possible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="compute capability 8.9 .* possible here: bf16, fp32"):
        made(True, precision="fp8")
    monkeypatch.setattr(frozen, "has_fp8", lambda device: True)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        made(True, precision="fp8")


@pytest.mark.parametrize("path", ["/nowhere/encoder", "Qwen/Qwen3-1.7B", "./missing"])
def test_missing_text_encoder_says_what_to_fetch(path: str) -> None:
    with pytest.raises(ConfigError, match="text_encoder.path") as caught:
        TextEncoder.load(TextEncoderConfig(path=path), CPU)
    assert "Qwen/Qwen3-1.7B" in str(caught.value)


def test_dinov2_gives_one_token_per_model_patch(image_encoder: Path) -> None:
    encoder = ImageEncoder.load(ImageEncoderConfig(path=str(image_encoder)), CPU)
    tokens = encoder.encode(torch.rand(2, 3, 32, 48) * 2 - 1)
    assert tokens.shape == (2, 2 * 3, encoder.width)


def test_dinov2_converts_from_the_original_file(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "folder", safe_serialization=True)
    # The files keep the published names whatever the installed version calls the weights.
    ours = load_file(tmp_path / "folder" / "model.safetensors")
    original = {
        "cls_token": ours["embeddings.cls_token"],
        "mask_token": ours["embeddings.mask_token"],
        "pos_embed": ours["embeddings.position_embeddings"],
        "patch_embed.proj.weight": ours["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": ours["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": ours["layernorm.weight"],
        "norm.bias": ours["layernorm.bias"],
    }
    for i in range(2):
        layer = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = [ours[f"{layer}attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            original[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            original[f"blocks.{i}.attn.proj.{kind}"] = ours[f"{layer}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                original[f"blocks.{i}.{name}.{kind}"] = ours[f"{layer}{name}.{kind}"]
        for number in "12":
            original[f"blocks.{i}.ls{number}.gamma"] = ours[f"{layer}layer_scale{number}.lambda1"]
    torch.save(original, tmp_path / "dinov2.pth")
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    found = [
        ImageEncoder.load(ImageEncoderConfig(path=str(tmp_path / name)), CPU).encode(image)
        for name in ("folder", "dinov2.pth")
    ]
    assert torch.equal(*found)
    rounded = ImageEncoderConfig(path=str(tmp_path / "dinov2.pth"), precision="bf16")
    assert ImageEncoder.load(rounded, CPU).encode(image).dtype == torch.bfloat16
    with pytest.raises(KeyError, match="unknown DINOv2 tensor head.weight.x"):
        dinov2_from_original({"head.weight.x": torch.zeros(1)})
    del original["blocks.1.attn.proj.weight"]
    torch.save(original, tmp_path / "dinov2.pth")
    with pytest.raises(ConfigError, match=r"dinov2.pth lacks 1 weights of its model, such as encoder.layer.1"):
        ImageEncoder.load(ImageEncoderConfig(path=str(tmp_path / "dinov2.pth")), CPU)


def test_missing_image_encoder_says_what_to_fetch() -> None:
    with pytest.raises(ConfigError, match="dinov2_vitb14_pretrain.pth"):
        ImageEncoder.load(ImageEncoderConfig(path="/nowhere/dino.pth"), CPU)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_missing_weights_are_an_error(kind: str, tmp_path: Path, text_encoder: Path, image_encoder: Path) -> None:
    source = text_encoder if kind == "text" else image_encoder
    folder = tmp_path / "cut"
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(state) if "layer" in name)
    save_file({n: v for n, v in state.items() if n != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights"):
        if kind == "text":
            load_text(folder)
        else:
            ImageEncoder.load(ImageEncoderConfig(path=str(folder)), torch.device("cpu"))
