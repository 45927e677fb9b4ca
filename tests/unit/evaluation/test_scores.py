"""Scores against other implementations, image files against hostile ones, the ADM suite's file."""

import io
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore as OtherInceptionScore

from deco_scale.errors import ConfigError, RunError
from deco_scale.evaluation import fid
from deco_scale.evaluation.fid import (
    ClassSpread,
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    precision_recall,
)
from deco_scale.evaluation.imagenet import ImageSet, generate_parts, join_pieces, missing_pieces
from deco_scale.evaluation.npz import array_names, images_shape, read_floats, read_images, write_images
from deco_scale.sampling.output_dir import claim_folder
from tests.support.evaluations import (
    SmallInception,
    expected_scores,
    features,
    gaussian_of,
    generator,
    images,
    normal,
    nothing,
    small_inception,
)


def test_moments_in_batches_and_over_processes_are_numpys() -> None:
    x = features(500, 12, 0) * 30 + 1e4
    parts = [Moments(12), Moments(12)]
    for i, batch in enumerate(x.split(37)):
        parts[i % 2].add(batch)
    whole = Moments(12)
    for mine, *others in zip(whole.sums(), *(part.sums() for part in parts), strict=True):
        mine += sum(others)
    found = whole.gaussian()
    np.testing.assert_allclose(found.mean_F, x.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_FF, np.cov(x.numpy(), rowvar=False), rtol=1e-6)
    with pytest.raises(ValueError, match="2 features"):
        Moments(3).gaussian()


@pytest.mark.parametrize(("count", "width"), [(400, 24), (2000, 64)])
def test_frechet_distance_is_torchmetrics(count: int, width: int) -> None:
    a, b = gaussian_of(features(count, width, 1)), gaussian_of(features(count + 7, width, 2))
    wanted = _compute_fid(a.mean_F, a.covariance_FF, b.mean_F, b.covariance_FF).item()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_of_fewer_features_than_dimensions() -> None:
    """Against the nuclear norm of the product of the centred features, which needs no matrix root."""
    x, y = features(9, 40, 3), features(13, 40, 4)
    a, b = gaussian_of(x), gaussian_of(y)
    cx, cy = (x - x.mean(0)) / 8**0.5, (y - y.mean(0)) / 12**0.5
    cross = torch.linalg.svdvals(cx @ cy.T).sum()
    wanted = (x.mean(0) - y.mean(0)).square().sum() + cx.square().sum() + cy.square().sum() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5 * cx.square().sum().item())


def test_frechet_distance_of_known_gaussians() -> None:
    """Covariances that commute: the squared distance of means plus that of the standard deviations."""
    q, _ = torch.linalg.qr(normal(10, 10, seed=5))
    s, t = torch.arange(10).double(), torch.arange(10).flip(0).double() * 3
    shift = normal(10, seed=6)
    a = Gaussian(torch.zeros(10).double(), q @ s.square().diag() @ q.T)
    b = Gaussian(shift, q @ t.square().diag() @ q.T)
    wanted = shift.square().sum() + (s - t).square().sum()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-7)


def test_inception_score_is_torchmetrics_and_splits_are_averaged() -> None:
    logits = normal(230, 20, seed=7) * 3
    other = OtherInceptionScore(feature=nn.Identity(), splits=1)
    other.update(logits)
    whole = InceptionScore(20)
    for batch in logits.split(33):
        whole.add(batch)
    assert whole.score() == pytest.approx(other.compute()[0].item(), rel=1e-9)
    split = InceptionScore(20, split=100)
    for batch in logits.split(33):
        split.add(batch)
    scores = []
    for part in logits.split(100):
        spread = ClassSpread(20)
        spread.add(part)
        scores.append(spread.score())
    assert len(scores) == 3 and split.score() == pytest.approx(np.mean(scores), rel=1e-12)


def test_inception_score_of_certain_and_uncertain_predictions() -> None:
    sure = InceptionScore(8)
    sure.add(1e4 * torch.eye(8))
    assert sure.score() == pytest.approx(8)
    unsure = InceptionScore(8)
    unsure.add(torch.zeros(5, 8))
    assert unsure.score() == pytest.approx(1)


def brute_force(samples: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    """Pair by pair."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm())

    def radii(points: Tensor) -> list[float]:
        return [
            sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)
        ]

    def share(queries: Tensor, points: Tensor) -> float:
        reach = radii(points)
        inside = [any(distance(q, p) <= r for p, r in zip(points, reach, strict=True)) for q in queries]
        return sum(inside) / len(inside)

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("block", [5, 16, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_every_pair(block: int, k: int) -> None:
    reference, samples = normal(40, 4, seed=8), 0.7 * normal(33, 4, seed=9) + 0.8
    wanted = brute_force(samples, reference, k)
    assert 0.1 < wanted[1] < wanted[0] < 1
    for dtype in (torch.float64, torch.float32):
        found = precision_recall(samples.to(dtype), reference.to(dtype), neighbours=k, block=block)
        assert found == pytest.approx(wanted)


def test_precision_and_recall_of_equal_collapsed_and_far_sets() -> None:
    x = normal(50, 6, seed=10).float()
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 100, x) == (0.0, 0.0)
    precision, recall = precision_recall(x[:1] + 1e-3 * x, x)
    assert precision > 0.9 and recall < 0.2
    with pytest.raises(ValueError, match="3 samples are too few"):
        precision_recall(x[:3], x)


# Files.


def test_npz_is_numpys_whatever_the_pieces(tmp_path: Path) -> None:
    x = images(23)
    files = []
    for sizes in ([23], [1] * 23, [10, 13]):
        path = tmp_path / f"{len(sizes)}.npz"
        write_images(path, x.shape, np.split(x, np.cumsum(sizes)[:-1]))
        with np.load(path, allow_pickle=False) as found:
            assert found.files == ["arr_0"] and np.array_equal(found["arr_0"], x)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]
    assert images_shape(path) == x.shape and array_names(path) == ["arr_0"]
    np.savez_compressed(tmp_path / "z.npz", x)
    for each in (path, tmp_path / "z.npz"):
        batches = list(read_images(each, 5))
        assert [len(b) for b in batches] == [5, 5, 5, 5, 3] and np.array_equal(np.concatenate(batches), x)
    assert {p.suffix for p in tmp_path.iterdir()} == {".npz"}


def test_writing_and_reading_hold_a_piece_at_a_time(tmp_path: Path) -> None:
    piece = np.zeros((16, 128, 128, 3), np.uint8)
    tracemalloc.start()
    write_images(tmp_path / "x.npz", (1024, 128, 128, 3), (piece for _ in range(64)))
    assert sum(len(batch) for batch in read_images(tmp_path / "x.npz", 16)) == 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.npz").stat().st_size > 1024 * 128 * 128 * 3 > 8 * peak


def test_pieces_that_do_not_make_up_the_shape_leave_nothing(tmp_path: Path) -> None:
    x = images(4)
    for shape, pieces in (((5, *x.shape[1:]), [x]), (x.shape, [x[:, :3]]), (x.shape, [x.astype(np.int32)])):
        with pytest.raises(ValueError):
            write_images(tmp_path / "x.npz", shape, pieces)
        assert not (tmp_path / "x.npz").exists()


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for wrong in (
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.asfortranarray(images(2)),
        np.array([{"a": 1}], dtype=object),
    ):
        np.savez(path, arr_0=wrong)
        with pytest.raises(RunError, match="arr_0"):
            list(read_images(path, 2))
    np.savez(path, mu=np.zeros(7), sigma=np.eye(3, dtype=np.int64), other=np.array([1, "a"], dtype=object))
    for name, shape in (("mu", (8,)), ("sigma", (3, 3)), ("other", (2,)), ("absent", (1,))):
        with pytest.raises(RunError, match=name):
            read_floats(path, name, shape)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("torn.npy", b"not an array")
    with pytest.raises(RunError, match="torn: "):
        read_floats(path, "torn", (1,))
    np.savez(path, mu=np.arange(3, dtype=np.float32))
    assert read_floats(path, "mu", (3,)).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_damaged_npz_are_named_or_right(random: Any) -> None:
    x = images(6)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x) if random.random() < 0.5 else np.savez(buffer, x)
    data = bytearray(buffer.getvalue())
    for _ in range(random.choice([1, 3, 20])):
        data[random.randrange(len(data))] = random.randrange(256)
    if random.random() < 0.3:
        data = data[: random.randrange(len(data))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        path.write_bytes(data)
        try:
            found = np.concatenate(list(read_images(path, 4)))
        except RunError as error:
            assert str(path) in str(error)
        else:
            # Names, dates and header bytes without meaning may change; pixels are under a checksum.
            assert np.array_equal(found.ravel(), x.ravel())


def test_a_header_that_promises_too_much_reserves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 10**6, 10**6, 3)}
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(RunError, match="ends after 0 of"):
        list(read_images(path, 1))


def test_a_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    settings = {"sampler": {"order": 2, "guidance": 3.5}, "count": 4}
    claim_folder(tmp_path / "out", settings)
    claim_folder(tmp_path / "out", settings)
    with pytest.raises(ConfigError, match="count=4, now 5"):
        claim_folder(tmp_path / "out", settings | {"count": 5})
    for damaged in ("{", "[]", "[" * 100_000):
        (tmp_path / "out" / "settings.json").write_text(damaged)
        with pytest.raises(ConfigError, match="settings.json"):
            claim_folder(tmp_path / "out", settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        claim_folder(tmp_path / "file", settings)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> SmallInception:
    return small_inception(monkeypatch)


# FID of files.


def test_scores_of_files_and_each_kind_of_reference(inception: Any, tmp_path: Path) -> None:
    x, y = images(60, 1), images(80, 2) // 2 + 30
    np.savez(tmp_path / "x.npz", x)
    found_b = inception(torch.from_numpy(y))
    pool, spatial = gaussian_of(found_b.pool_BF), gaussian_of(found_b.spatial_BF)
    means = {"mu": pool.mean_F.numpy(), "sigma": pool.covariance_FF.numpy()}
    spatials = {"mu_s": spatial.mean_F.numpy(), "sigma_s": spatial.covariance_FF.numpy()}
    wanted = expected_scores(inception, x, y)
    assert 0 < wanted["recall"] < 1
    for arrays, absent in (
        ({"arr_0": y}, ()),
        ({"arr_0": y, **means, **spatials}, ()),
        ({**means, **spatials}, ("precision", "recall")),
        (means, ("sfid", "precision", "recall")),
    ):
        np.savez(tmp_path / "y.npz", **arrays)
        seen: list[int] = []
        scores = fid.score_files(inception, tmp_path / "x.npz", tmp_path / "y.npz", batch=7, on_batch=seen.append)
        for name, value in wanted.items():
            found = getattr(scores, name)
            assert found is None if name in absent else found == pytest.approx(value, rel=1e-4), name
        assert sum(seen) == fid.check_files(tmp_path / "x.npz", tmp_path / "y.npz")


def test_statistics_stand_before_the_references_images(inception: Any, tmp_path: Path) -> None:
    """As in the ADM suite: the images of a reference batch are only some of those the statistics are of."""
    x, y = images(20, 1), images(30, 2)
    np.savez(tmp_path / "x.npz", x)
    np.savez(tmp_path / "y.npz", arr_0=y, mu=np.full(12, 100.0), sigma=np.eye(12))
    scores = fid.score_files(inception, tmp_path / "x.npz", tmp_path / "y.npz")
    assert scores.fid > 1e4 and scores.precision == expected_scores(inception, x, y)["precision"]


def test_references_without_use_are_refused(inception: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images(5))
    for arrays, message in (
        ({"other": np.zeros(3)}, "neither arr_0 nor mu"),
        ({"mu": np.zeros(11), "sigma": np.eye(11)}, "mu is float64"),
        ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, "not finite"),
    ):
        np.savez(tmp_path / "y.npz", **arrays)
        with pytest.raises(RunError, match=message):
            fid.score_files(inception, tmp_path / "x.npz", tmp_path / "y.npz")
    np.savez(tmp_path / "y.npz", images(1))
    with pytest.raises(RunError, match="one image"):
        fid.score_files(inception, tmp_path / "y.npz", tmp_path / "x.npz")


# ImageNet.


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 7), st.integers(1, 40))
def test_classes_are_balanced_everywhere_and_no_noise_is_used_twice(count: int, classes: int, piece: int) -> None:
    wanted = ImageSet(count=count, num_classes=classes, size=(6, 8), first_seed=5, piece=piece)
    requests = [request for i in range(wanted.num_pieces) for request in wanted.requests(i)]
    assert [request.seed for request in requests] == list(range(5, 5 + count))
    for start in range(0, count, 10):
        seen = [
            sum(request.condition == c for request in requests[start : start + 2 * classes])
            for c in range(classes)
        ]
        assert max(seen) - min(seen) <= 1
    assert len({(request.condition, request.index) for request in requests}) == count


def test_broken_off_resumed_and_shared_pieces_give_the_same_file(tmp_path: Path) -> None:
    wanted = ImageSet(count=37, num_classes=4, size=(6, 8), piece=8)
    generate_parts(generator(), wanted, tmp_path / "a", missing_pieces(wanted, tmp_path / "a"), on_image=nothing)
    first = join_pieces(wanted, tmp_path / "a")
    assert first.name == "samples_37x6x8x3.npz" and missing_pieces(wanted, tmp_path / "a") == []
    assert [p.name for p in (tmp_path / "a").iterdir()] == [first.name]
    with pytest.raises(KeyboardInterrupt):
        generate_parts(generator(fail_at=20), wanted, tmp_path / "b", [0, 1, 2, 3, 4], on_image=nothing)
    assert missing_pieces(wanted, tmp_path / "b") == [2, 3, 4]
    with pytest.raises(RunError, match="piece_000002"):
        join_pieces(wanted, tmp_path / "b")
    # A piece that the disk cut short is drawn again.
    cut = tmp_path / "b" / "piece_000001.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    for share in ([3, 4], [1, 2]):
        generate_parts(generator(), wanted, tmp_path / "b", share, on_image=nothing)
    assert join_pieces(wanted, tmp_path / "b").read_bytes() == first.read_bytes()
