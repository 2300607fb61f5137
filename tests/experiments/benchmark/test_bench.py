"""The benchmark: what it counts, how it compares, what it leaves; no times are judged here."""

import json
import random
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import diffstride as ds
from diffstride.backends import DENSE_UP_TO
from diffstride.experiments.benchmark import bench
from diffstride.experiments.commands.main import main
from diffstride.experiments.models import ResNet

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
N = 1000  # samples of float32 in the tensors of the memory tests


def settings(**changes):
    return bench.Settings(("float32",), CPU, repeats=2, seed=0, quick=True, full=False)._replace(**changes)


class Copies(torch.autograd.Function):
    """Makes 2 N and keeps N of them beside its result of N; its backward makes 5 N."""

    @staticmethod
    def forward(ctx, x):
        twice = torch.cat([x, x])
        ctx.save_for_backward(twice[:N].clone())
        return twice[N:].clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad] * 5)[:N].clone()


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x: x.exp().exp(), 4),  # two results, which backward needs, and their two gradients
        (lambda x: (x + 1) + 1, 2),  # a sum needs nothing of its inputs, and its gradient is that from above
        (lambda x: x.exp().view(2, -1).mT[1:].detach(), 1),  # views have no storage of their own
        (lambda x: x.detach().exp().add_(1).mul_(2), 1),  # nor what is changed in place
        (lambda x: x.detach().mul_(1), 0),  # there before
        (Copies.apply, 8),  # backward: N of the result, N saved, 5 N, and the gradient
    ],
)
def test_peak_memory_of_known_cases(function, tensors):
    x = torch.zeros(N, requires_grad=True)
    above = torch.ones(N)

    def step():
        y = function(x)
        return torch.autograd.grad(y, x, above) if y.requires_grad else y

    assert bench.peak_bytes(step, CPU) == tensors * N * x.element_size()


def test_what_only_the_graph_holds_counts_until_it_is_freed():
    x = torch.zeros(N, requires_grad=True)
    with bench.StorageMeter() as meter:
        loss = x.exp().exp().sum()
        assert meter.alive == 2 * N * 4 + 4
        loss.backward()
        del loss
        assert meter.alive == N * 4  # x.grad


class Clock:
    """Time that passes only where a step says so."""

    now = 0.0
    calls: list

    def __init__(self):
        self.calls = []

    def contestant(self, name, durations):
        left = iter(durations)

        def step():
            self.calls.append(name)
            self.now += next(left)

        return bench.Candidate(step)


def test_every_contestant_has_one_turn_a_round_in_a_new_order():
    repeats, names = 40, ["a", "b", "c"]

    def calls(seed):
        clock = Clock()
        contestants = {name: clock.contestant(name, [1.0] * 100) for name in names}
        bench.alternate(contestants, repeats, random.Random(seed), clock=lambda: clock.now)
        return clock.calls

    rounds = list(zip(*[iter(calls(0))] * len(names), strict=True))
    assert len(rounds) == bench.WARMUP + repeats
    assert all(sorted(turns) == names for turns in rounds)
    for place in range(len(names)):  # no one is always first or last: each is there in a third of the rounds or so
        assert all(5 <= sum(turns[place] == name for turns in rounds) <= 25 for name in names)
    assert calls(0) == calls(0) != calls(1)


def test_times_are_those_after_the_warm_up():
    clock = Clock()
    warm = [100.0] * bench.WARMUP
    contestants = {"a": clock.contestant("a", [*warm, 1.0, 2.0]), "b": clock.contestant("b", [*warm, 3.0, 5.0])}
    rounds = []
    seconds = bench.alternate(
        contestants, 2, random.Random(0), clock=lambda: clock.now, after_round=lambda: rounds.append(1)
    )
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 5.0]}
    assert len(rounds) == bench.WARMUP + 2


def test_ratios_are_of_medians_and_quartiles_of_rounds():
    seconds = {"own": [0.2, 0.2, 1.2], "reference": [0.1, 0.2, 0.4]}
    reference, own = bench.compare(
        seconds, {"own": 3 * 2**20, "reference": 2 * 2**20}, "reference", ["own", "reference"]
    )
    assert (reference["name"], reference["ratio"], reference["ratio_low"], reference["ratio_high"]) == (
        "reference",
        1,
        1,
        1,
    )
    assert own["name"] == "own"
    assert own["reference"] == "reference"
    assert own["ms"] == pytest.approx(200)
    assert own["ratio"] == pytest.approx(1)  # 0.2 / 0.2
    assert (own["ratio_low"], own["ratio_high"]) == pytest.approx((1.5, 2.5))  # of 1, 2 and 3
    assert (own["peak_mb"], own["peak_ratio"]) == (3, 1.5)


@pytest.mark.parametrize("window", ["outer", "inner"])
@pytest.mark.parametrize("size", [16, 32, 33, 112, 2048])
def test_strides_drift_and_sizes_stay(window, size):
    layer = ds.DiffStride2d((2.0, 3.0), 1, window=window)
    before = layer.output_size(size)
    contestant = bench.Candidate(lambda: None, torch.nn.Sequential(layer))
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        contestant.drift(rng)
        assert layer.output_size(size) == before
        assert layer.strides == pytest.approx((2.0, 3.0), rel=2 * bench.DRIFT)
        seen.add(layer.strides)
    assert len(seen) > 40


def test_what_a_dtype_does_not_have_is_noted_and_other_errors_are_not_hidden():
    x = torch.zeros(N, requires_grad=True)

    def fail(message):
        raise NotImplementedError(message)

    def case(message):
        others = {"fine": bench.layer_step(torch.exp, x), "failing": bench.Candidate(lambda: fail(message))}
        return bench.Case("layers", {"dtype": "float32"}, lambda: others, {"fine": None})

    rows, missing = bench.measure(case("kernel not implemented for 'Half'\nmore"), settings(), lambda: None)
    assert [row["name"] for row in rows] == ["fine"]
    assert [(m["name"], m["error"]) for m in missing] == [("failing", "kernel not implemented for 'Half'")]
    with pytest.raises(NotImplementedError, match="something else"):
        bench.measure(case("something else"), settings(), lambda: None)


def test_gradients_are_those_of_input_weights_and_strides():
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), ds.DiffStride2d())
    x = torch.randn(2, 2, 12, 12, requires_grad=True)
    found = bench.layer_step(module, x).step()
    assert [g.shape for g in found] == [(2, 2, 12, 12), (3, 2, 3, 3), (3,), (2,)]
    assert all(g.abs().sum() > 0 for g in found)


def test_controls_are_the_same_network_with_maps_of_the_same_sizes(monkeypatch):
    monkeypatch.setattr(bench, "training_step", lambda network, *_: network)
    (case,) = bench.steps(settings())
    networks = case.contestants()
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert bench.stage_sizes(networks["DiffStride, R=4"], images) == [(24, 24), (20, 20), (18, 18)]
    assert len(bench.CONTROLS) == 2
    for control, name in bench.CONTROLS.items():
        sizes = [bench.stage_sizes(networks[n], torch.zeros(case.facts["shape"])) for n in (control, name)]
        assert sizes[0] == sizes[1]
        assert not ds.strides(networks[control])
        assert len(ds.strides(networks[name])) == 3
        weights = [dict(networks[n].named_parameters()) for n in (control, name)]
        assert weights[0].keys() == {k for k in weights[1] if not k.endswith("stride")}
        assert case.comparisons[control] == [name]


def test_training_step_trains():
    network = ResNet(width=1 / 16, downsample="diffstride")
    before = [p.detach().clone() for p in network.parameters()]
    bench.training_step(network, torch.randn(2, 3, 16, 16), torch.float32).step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


LAYERS = {
    "data movement", "avg_pool2d", "blur pooling", "antialiased bilinear", "strided convolution",
    "FFT, naive port, R=4", "FFT, axis by axis, R=1", "FFT, axis by axis, R=4", "FFT, joint, R=1", "FFT, joint, R=4",
    "DiffStride, R=1", "DiffStride, R=4", "DiffStride, inner window", "DiffStride, DCT, R=4", "DiffStride, by FFT, R=4",
    "SpectralPool",
}  # fmt: skip
NETWORKS = {
    "strided convolution", "average pooling", "blur pooling", "spectral pooling", "DiffStride, inner window",
    "DiffStride, R=1", "DiffStride, R=4", *bench.CONTROLS,
}  # fmt: skip


def in_case(rows, reference, **facts):
    return {r["name"]: r for r in rows if r["reference"] == reference and facts.items() <= r["case"].items()}


def test_a_run_measures_everyone_and_leaves_everything(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "steps", "layers", "--quick", "--seed", "3", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert set(report) == {
        "commit", "versions", "hardware", "device", "threads", "allocator", "repeats", "seed", "command", "rows",
        "missing",
    }  # fmt: skip
    assert (report["threads"], report["repeats"], report["seed"]) == (1, 2, 3)
    assert report["command"] == f"diffstride bench steps layers --quick --seed 3 --out {out}"
    rows = report["rows"]
    for row in rows:
        assert list(row) == [
            "suite", "case", "name", "ms", "ratio", "ratio_low", "ratio_high", "reference", "peak_mb", "peak_ratio"
        ]  # fmt: skip
        assert 0 < row["ratio_low"] <= row["ratio_high"]
        assert row["peak_mb"] > 0

    for memory_format in ("contiguous", "channels_last"):
        wide = in_case(rows, "avg_pool2d", dtype="float32", memory_format=memory_format)
        assert set(wide) == LAYERS
        samples = 2 * 4 * 12 * 12
        assert wide["avg_pool2d"]["peak_mb"] * 2**20 == 4 * (samples / 4 + samples)
        assert wide["data movement"]["peak_mb"] * 2**20 == 4 * 2 * samples
        half = in_case(rows, "avg_pool2d", dtype="bfloat16", memory_format=memory_format)
        absent = {m["name"] for m in report["missing"] if m["case"]["memory_format"] == memory_format}
        assert set(half) | absent == LAYERS
        assert not set(half) & absent
        assert absent <= {"antialiased bilinear"}
    for dtype in ("float32", "bfloat16"):
        assert set(in_case(rows, "strided convolution", dtype=dtype)) == NETWORKS
        for control, name in bench.CONTROLS.items():
            assert set(in_case(rows, control, dtype=dtype)) == {control, name}

    printed = capsys.readouterr().out
    assert [printed.count(f"{suite}: time, over that of") for suite in ("layers", "steps", "convolutions")] == [1, 1, 0]
    row = in_case(rows, "strided convolution", dtype="bfloat16")["DiffStride, R=4"]
    assert f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})" in printed


def test_convolutions(tmp_path):
    out = tmp_path / "bench.json"
    assert main(["bench", "convolutions", "--quick", "--dtypes", "bfloat16", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    names = {"convolution, then layer", "one operator", "strided convolution"}
    for facts in (
        {"stride": 2, "smoothness": 1}, {"stride": 2, "smoothness": 4, "window": "outer"}, {"stride": 3},
        {"window": "inner"},
    ):  # fmt: skip
        assert set(in_case(rows, "convolution, then layer", **facts)) == names
    assert len(rows) == 12


def test_calibration_finds_the_crossover_and_records_the_allocator(tmp_path, capsys, monkeypatch):
    for name, value in bench.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "c.json"
    assert main(["bench", "--calibrate", "--quick", "--dtypes", "float32", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["allocator"] == bench.ALLOCATOR
    printed = capsys.readouterr().out
    assert "MALLOC" not in printed
    assert f"DENSE_UP_TO = {{torch.float32: {report['crossover']['float32']}}}" in printed
    assert report["crossover"] == bench.crossovers(report["rows"])
    shapes = {tuple(r["case"]["shape"]) for r in report["rows"]}
    assert shapes == {(16, 16, 16), (8, 16, 32), (1, 16, 16, 16), (1, 16, 32, 32)}
    assert {r["name"] for r in report["rows"]} == {"fft", "matmul"}


def test_the_crossover_is_the_last_length_at_which_half_the_ratios_are_at_most_one():
    def rows(dtype, length, *ratios):
        case = {"dtype": dtype, "shape": [1, 16, length]}
        return [
            {"case": case, "name": n, "ratio": r if n == "matmul" else 1.0} for r in ratios for n in ("fft", "matmul")
        ]

    found = bench.crossovers(
        [
            *rows("float32", 64, 0.5, 0.6),
            *rows("float32", 128, 0.5, 1.5),
            *rows("float32", 256, 0.5, 1.6),
            *rows("bfloat16", 64, 1.1, 1.2),
        ]
    )
    assert found == {"float32": 128, "bfloat16": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer"], "unknown suite 'layer'; there are layers, convolutions, steps"),
        (["--calibrate", "layers"], "--calibrate takes the place of the suites"),
        (["--calibrate", "--full"], "--calibrate takes the place of the suites"),
        (["--repeats", "1"], "--repeats must be at least 2, for a spread, got 1"),
        (["--repeats", "many"], "argument --repeats: invalid int value: 'many'"),
        (["--dtypes", "int8"], "argument --dtypes: invalid choice: 'int8'"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--out", "no/such/folder/bench.json"], "there is no folder no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"diffstride: error: {message}")
    assert error.count("\n") == 1


def test_a_gpu_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_the_allocator_is_advised_where_it_is_not_set(capsys, monkeypatch):
    for name in bench.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench, "calibration", lambda _: [])
    assert main(["bench", "--calibrate"]) == 0
    advice = next(line for line in capsys.readouterr().out.splitlines() if "MALLOC" in line)
    assert advice.endswith("MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 diffstride bench")
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"{name}={value}" in makefile for name, value in bench.ALLOCATOR.items())


PAGE = """# Speed

<!-- bench:facts -->
<!-- /bench -->
between
<!-- bench:layers -->
old
<!-- /bench -->
after
"""


def made_up(suite="layers"):
    """A report with one case in two dtypes; in the second, one contestant is missing."""
    seconds = {"avg_pool2d": [1.0, 1.0], "ours": [1.5, 2.5], "other": [3.0, 3.0]}
    rows = []
    for dtype, names in {"float32": ["ours", "other"], "bfloat16": ["ours"]}.items():
        case = {"shape": [2, 4, 8, 8], "stride": 2, "dtype": dtype, "memory_format": "channels_last"}
        found = bench.compare(seconds, dict.fromkeys(seconds, 2**20) | {"ours": 2**21}, "avg_pool2d", names)
        rows += [{"suite": suite, "case": case, **row} for row in found]
    return {
        "commit": "0123abcd", "versions": {"torch": "2.13.0"}, "hardware": "a machine", "threads": 2,
        "allocator": {"MALLOC_TRIM_THRESHOLD_": "1"}, "repeats": 2, "seed": 0, "command": "diffstride bench layers",
        "rows": rows,
    }  # fmt: skip


def test_a_page_takes_its_tables_from_the_results(tmp_path, monkeypatch):
    script = str(ROOT / "benchmarks" / "write_performance.py")
    page, results = tmp_path / "page.md", tmp_path / "bench.json"
    page.write_text(PAGE)
    results.write_text(json.dumps(made_up()))
    monkeypatch.setattr("sys.argv", ["write_performance.py", str(results), str(page)])
    runpy.run_path(script, run_name="__main__")
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Speed\n\n<!-- bench:facts -->\n| | |")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "<!-- /bench -->\nbetween\n<!-- bench:layers -->\n" in text
    assert (
        "|  | 2×4×8×8, channels_last |\n| --- | ---: |\n| avg_pool2d | 1e+03 ms |\n| ours | 2.00 (1.75–2.25) |" in text
    )
    assert "| avg_pool2d | 1 MB |\n| ours | 2.00 |\n| other | 1.00 |" in text
    assert "| other | - |" in text
    assert "| commit | 0123abcd |" in text
    assert "| allocator | `MALLOC_TRIM_THRESHOLD_=1` |" in text
    tables = runpy.run_path(script)["tables"](json.loads(results.read_text()))
    assert set(tables) == {"facts", "layers"}
    assert all(f"<!-- bench:{name} -->\n{table}<!-- /bench -->" in text for name, table in tables.items())
    runpy.run_path(script, run_name="__main__")
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("page", "message"), [(PAGE, "the page asks for layers; the results have"), ("", "no line <!--")]
)
def test_a_page_that_the_results_do_not_fill_stays(page, message, tmp_path, monkeypatch, capsys):
    path, results = tmp_path / "page.md", tmp_path / "bench.json"
    path.write_text(page)
    results.write_text(json.dumps(made_up("steps") | {"rows": made_up()["rows"][:0]}))
    monkeypatch.setattr("sys.argv", ["write_performance.py", str(results), str(path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "benchmarks" / "write_performance.py"), run_name="__main__")
    assert message in capsys.readouterr().err
    assert path.read_text() == page


def test_the_longer_list_goes_down_the_page():
    rows = []
    for n in (4, 8, 12):
        row = made_up()["rows"][1]
        case = {**row["case"], "shape": [n]}
        rows += [{**row, "case": case, "name": name} for name in ("avg_pool2d", "ours")]
    (sheet, _) = bench.sheets(rows, "layers")
    assert sheet.header == ["", "avg_pool2d", "ours"]
    assert [line[0] for line in sheet.sections["float32"]] == [f"{n}, channels_last" for n in (4, 8, 12)]
    assert all(a[2] == b[2] for a, b in pairwise(sheet.sections["float32"]))


def test_the_page_shows_what_was_measured():
    fill = runpy.run_path(str(ROOT / "benchmarks" / "write_performance.py"))["fill"]
    page = (ROOT / "docs" / "results" / "performance.md").read_text()
    assert fill(page, json.loads((ROOT / "results" / "bench-cpu.json").read_text())) == page
    calibration = json.loads((ROOT / "results" / "calibration-cpu.json").read_text())["crossover"]
    assert calibration == {
        str(dtype).removeprefix("torch."): DENSE_UP_TO[dtype] for dtype in (torch.float32, torch.bfloat16)
    }
    for length in calibration.values():
        assert f"{length}" in page
