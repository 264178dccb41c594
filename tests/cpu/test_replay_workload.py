"""Readers and transforms of workloads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.tools.workload import WorkloadError, WorkloadSpec, load_workload, save_workload
from morphserve.tools.workload.formats import TraceRequest, read_trace
from morphserve.tools.workload.workload import Workload, check_fits

SHIPPED = Path(__file__).parents[2] / "scripts" / "workloads"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def azure(tmp_path: Path, num: int = 40) -> Path:
    """One request a second from 18:17:03.5, lengths 100, 101, ... in and 10, 11, ... out."""
    rows = [f"2023-11-16 18:17:{3 + i:02d}.5000000,{100 + i},{10 + i}" for i in range(num)]
    return write(tmp_path / "azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", *rows)


def test_azure_window_is_cut_rebased_thinned_and_scaled(tmp_path: Path) -> None:
    """Guards the recipe: wrong re-basing, thinning positions, rounding or clipping changes every figure."""
    spec = WorkloadSpec(
        azure(tmp_path),
        window_s=(9.5, 20),
        thin=2.5,
        input_scale=0.25,
        input_clip=(28, 30),
        output_clip=(1, 25),
    )
    got = [(r.arrival_s, r.input_tokens, r.output_tokens) for r in load_workload(spec).requests]
    # window keeps seconds 10..29; thinning keeps positions 0, 3, 5, 8, 10, 13, 15, 18 of those
    seconds = [10, 13, 15, 18, 20, 23, 25, 28]
    assert [a for a, _, _ in got] == pytest.approx([s - 9.5 for s in seconds])
    assert [i for _, i, _ in got] == [28, 28, 29, 30, 30, 30, 30, 30]
    assert [o for _, _, o in got] == [20, 23, 25, 25, 25, 25, 25, 25]


def test_thinning_keeps_the_time_scale_and_rate_scale_does_not(tmp_path: Path) -> None:
    """Guards against confusing the two: stretched time makes bursts longer, thinned does not."""
    path = azure(tmp_path)
    thinned = load_workload(WorkloadSpec(path, thin=3))
    faster = load_workload(WorkloadSpec(path, rate_scale=3))
    assert (len(thinned.requests), thinned.span_s) == (14, pytest.approx(39.0))
    assert (len(faster.requests), faster.span_s) == (40, pytest.approx(13.0))


@pytest.mark.parametrize(
    ("name", "requests"),
    [("convD", 81), ("convE", 81), ("conv593", 78), ("hybA", 90), ("hybB", 92), ("hybC", 76)],
)
def test_shipped_workloads_fit_the_demo_server(name: str, requests: int) -> None:
    """Guards the shipped files: one too long for the demo server would be an error of every run."""
    workload = load_workload(WorkloadSpec(SHIPPED / f"{name}.jsonl"))
    check_fits(workload, max_model_len=512)
    assert len(workload.requests) == requests
    assert workload.span_s < 72
    assert len({r.hash_ids for r in workload.requests}) == requests  # no accidental prefix sharing


def test_saved_window_keeps_its_lead_in(tmp_path: Path) -> None:
    """Guards the silence before the first request: without it a saved window is shifted."""
    workload = load_workload(WorkloadSpec(SHIPPED / "convD.jsonl"))
    assert workload.requests[0].arrival_s == pytest.approx(0.409)
    assert read_trace(SHIPPED / "convD.jsonl")[0].arrival_s == 0.0


@pytest.mark.parametrize("wide", [False, True])
def test_burstgpt_drops_failures_and_spreads_ties(tmp_path: Path, wide: bool) -> None:
    """Guards both BurstGPT layouts: zero-token rows are failures, whole seconds would all arrive at once."""
    more = ",Session ID,Elapsed time" if wide else ""
    tail = ",s1,0.5" if wide else ""
    path = write(
        tmp_path / "burst.csv",
        f"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type{more}",
        f"5,ChatGPT,472,18,490,Conversation log{tail}",
        f"5,GPT-4,30,0,30,Conversation log{tail}",
        f"5,GPT-4,31,7,38,API log{tail}",
    )
    got = read_trace(path, seed=3)
    assert sorted((r.input_tokens, r.output_tokens) for r in got) == [(31, 7), (472, 18)]
    assert 0 < got[1].arrival_s < 1
    assert got == read_trace(path, seed=3)
    assert got != read_trace(path, seed=4)


def test_vidur_columns(tmp_path: Path) -> None:
    """Guards the Vidur layout: a swap of prefill and decode would go unnoticed in a run."""
    path = write(tmp_path / "v.csv", "arrived_at,num_prefill_tokens,num_decode_tokens", "3.0,7,2", "1.5,9,4")
    assert read_trace(path) == [TraceRequest(0.0, 9, 4), TraceRequest(1.5, 7, 2)]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", ['{"timestamp": 0, "input_length": 5, "output_length": 5}', "{"], r"a\.jsonl:2: "),
        ("a.jsonl", ['{"timestamp": 0, "input_length": 5}'], r"a\.jsonl:1: key 'output_length'"),
        ("a.jsonl", ['{"timestamp": 0, "input_length": -5, "output_length": 5}'], r":1: token count is -5"),
        ("a.jsonl", ["7"], r"a\.jsonl:1: "),
        ("a.jsonl", [""], "no requests"),
        ("a.csv", ["TIMESTAMP,ContextTokens,GeneratedTokens", "soon,5,5"], r"a\.csv:2: .*soon"),
        ("a.csv", ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03,5"], r"a\.csv:2: .*3 col"),
        ("a.csv", ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03,5,1.5"], r":2: .*'1.5'"),
        ("a.csv", ["time,in,out", "1,2,3"], "none of the known layouts"),
        ("a.jsonl", ['{"timestamp": NaN, "input_length": 5, "output_length": 5}'], ":1: time is nan"),
        ("a.jsonl", ['{"timestamp": -5000, "input_length": 5, "output_length": 5}'], "request comes at -5 s"),
        ("a.jsonl", ['{"timestamp": 1.7e12, "input_length": 5, "output_length": 5}'], "comes at 1.7e.09 s.*--window"),
        ("a.jsonl", [f'{{"timestamp": 0, "input_length": 1{"0" * 400}, "output_length": 5}}'], r"a\.jsonl:1: "),
        ("a.csv", ["arrived_at,num_prefill_tokens,num_decode_tokens", "inf,7,2"], ":2: time is 'inf'"),
        ("a.csv", ["arrived_at,num_prefill_tokens,num_decode_tokens", f'"1,7,2{"x" * 200_000}'], "not a CSV file"),
    ],
)
def test_bad_files_are_refused_with_their_line(
    tmp_path: Path, name: str, lines: list[str], message: str
) -> None:
    """Guards against a traceback, or a silently skipped line, where a file is broken."""
    with pytest.raises(WorkloadError, match=message):
        load_workload(WorkloadSpec(write(tmp_path / name, *lines)))


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    """Guards against a bare OSError or UnicodeDecodeError."""
    with pytest.raises(WorkloadError, match="No such file"):
        load_workload(WorkloadSpec(tmp_path / "none.csv"))
    for name in ("b.csv", "b.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(WorkloadError, match="not UTF-8"):
            load_workload(WorkloadSpec(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thin": 0.5}, "--thin is 0.5"),
        ({"rate_scale": 0.0}, "--rate-scale is 0"),
        ({"input_scale": float("nan")}, "--input-scale"),
        ({"input_clip": (9, 3)}, "--input-clip is 9,3"),
        ({"output_clip": (0, 3)}, "--output-clip is 0,3"),
        ({"window_s": (5.0, 0.0)}, "--window"),
        ({"window_s": (500.0, 10.0)}, "nothing left"),
        ({"limit": 0}, "--num-requests is 0"),
    ],
)
def test_options_out_of_bounds_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Guards against an option that silently replays something else, or nothing."""
    with pytest.raises(WorkloadError, match=message):
        load_workload(WorkloadSpec(azure(tmp_path), **options))  # type: ignore[arg-type]


def test_too_long_requests_are_refused(tmp_path: Path) -> None:
    """Guards against a run whose longest requests all fail with HTTP 400 after the servers have started."""
    workload = load_workload(WorkloadSpec(azure(tmp_path)))
    check_fits(workload, max_model_len=139 + 49)
    with pytest.raises(WorkloadError, match=r"1 of 40 requests exceed max_model_len 187 .*139 in \+ 49 out"):
        check_fits(workload, max_model_len=187)


lengths = st.integers(1, 2000)
requests = st.lists(
    st.builds(TraceRequest, st.integers(0, 10**6).map(lambda ms: ms / 1000), lengths, lengths)
)


@given(requests.filter(bool))
def test_saved_workload_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[TraceRequest]
) -> None:
    """Guards the round trip, and hash ids that other tools need: one per 512 tokens, none shared."""
    path = tmp_path_factory.mktemp("save") / "w.jsonl"
    ordered = sorted(rows, key=lambda r: r.arrival_s)
    save_workload(Workload("w", tuple(ordered), block_tokens=512), path)
    back = load_workload(WorkloadSpec(path)).requests
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in back] == [
        (r.arrival_s, r.input_tokens, r.output_tokens) for r in ordered
    ]
    ids = [h for r in back for h in r.hash_ids]
    assert len(ids) == len(set(ids)) == sum(-(-r.input_tokens // 512) for r in ordered)


@pytest.mark.parametrize(("scale", "shared"), [(1.0, True), (0.5, False)])
def test_saving_keeps_shared_prefixes_only_unscaled(tmp_path: Path, scale: float, shared: bool) -> None:
    """Guards against promising a 512-token prefix that a scaled prompt no longer has."""
    row = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}'
    source = write(tmp_path / "a.jsonl", row, row)
    save_workload(load_workload(WorkloadSpec(source, input_scale=scale)), tmp_path / "b.jsonl")
    first, second = (json.loads(line)["hash_ids"] for line in (tmp_path / "b.jsonl").read_text().splitlines())
    assert (first == second) is shared
