"""What of the stub driver and of check_packed.py does not need NVIDIA's packages: names, environments, rows."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path

import check_packed
import pytest
from stub_driver import StubError, build
from stub_driver import build as build_stubs
from stub_driver.build import HERE, declared_functions, environment, exported_functions, fillers


def test_functions_are_found_with_their_versions() -> None:
    """Guards: a function that is asked for by its versioned name and is in no library."""
    header = """
    CUresult  cuInit(unsigned int Flags);
    extern CUresult cuMemAlloc_v2 (CUdeviceptr *p, size_t n);
    typedef CUresult (*PFN_cuNothing)(int);
    CUresult cuInit(unsigned int Flags);
    """
    assert declared_functions(header) == ["cuInit", "cuMemAlloc_v2"]


def test_exports_lose_their_library_and_keep_their_name() -> None:
    """Guards: a runtime without half of its functions, because a version was taken for a part of the name."""
    table = "0000000000050ad0 T cudaMalloc@@libcudart.so.13\n0000000000000000 A libcudart.so.13\n0001 W cudaFree\n"
    assert exported_functions(table) == ["cudaFree", "cudaMalloc"]


@pytest.mark.parametrize("traced", [True, False])
def test_what_is_written_by_hand_is_not_filled_in(tmp_path: Path, traced: bool) -> None:
    """Guards: two functions of one name, a filler that says it did what it did not, sources that do not compile."""
    source = tmp_path / "fillers.c"
    answer = "int fake_unsupported(const char *name) { return name[0] == 'c' ? 801 : -1; }\n" if traced else ""
    text = fillers(["cuOne", "cuTwo", "cuOne"], ["cuTwo"], traced)
    assert "cuTwo" not in text and text.count("int cuOne(") == 1
    source.write_text(text + answer)
    library = tmp_path / "fillers.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Werror", str(source), "-o", str(library)], check=True)
    assert ctypes.CDLL(str(library)).cuOne() == (801 if traced else 0)


def test_stubs_are_found_before_anything_else() -> None:
    """Guards: torch's own runtime is loaded, which asks the stub driver what is documented nowhere."""
    found = environment(Path("/stubs"), {"LD_LIBRARY_PATH": "/lib", "HOME": "/h"})
    assert found["LD_LIBRARY_PATH"] == "/stubs:/lib" and found["HOME"] == "/h"
    assert found["LD_PRELOAD"].split()[0] == "/stubs/libcudart.so.13"
    assert environment(Path("/stubs"), {})["LD_LIBRARY_PATH"] == "/stubs"


def test_an_environment_without_the_packages_is_named(tmp_path: Path) -> None:
    """Guards: a compiler's complaint about a header in place of what to install."""
    with pytest.raises(StubError, match="cuda.h.*Install torch with CUDA 13"):
        build_stubs(tmp_path, tmp_path / "stubs")
    with pytest.raises(StubError, match="nvidia/cu13"):
        check_packed.nvidia_of("true")
    assert build is build_stubs


def test_streams_and_captures_keep_their_order(tmp_path: Path) -> None:
    """Guards: copies of a capture that are done at once or never, a stream that stays captured, a capture that waiting
    in another thread's way does not spoil. Only this file of the stubs needs no header of NVIDIA's."""
    library = tmp_path / "work.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(HERE / "work.c"), "-o", str(library), "-lpthread"], check=True)
    work = ctypes.CDLL(str(library))
    work.fake_stream_new.restype = work.fake_event_new.restype = ctypes.c_void_p
    stream, other = (ctypes.c_void_p(work.fake_stream_new(0)) for _ in range(2))
    event, graph = ctypes.c_void_p(work.fake_event_new()), ctypes.c_void_p()
    source, target = ctypes.create_string_buffer(b"abc"), ctypes.create_string_buffer(b"...")

    def copy(on: ctypes.c_void_p) -> None:
        assert work.fake_copy(target, source, ctypes.c_size_t(3), on) == 0

    assert work.fake_capture_begin(stream, 0) == 0 and work.fake_capture_begin(other, 0) != 0
    work.fake_event_record(event, stream)
    work.fake_event_wait(event, other)
    copy(other)
    assert target.value == b"..." and work.fake_capture_id(other, None) != 0
    assert work.fake_capture_end(other, ctypes.byref(graph)) != 0, "not where it began"
    assert work.fake_capture_end(stream, ctypes.byref(graph)) == 0 and graph.value
    assert work.fake_capture_id(other, None) == 0 and target.value == b"..."
    source.value = b"xyz"
    assert work.fake_graph_launch(graph, stream) == 0 and target.value == b"xyz"
    source.value = b"now"
    copy(stream)
    assert target.value == b"now"
    assert work.fake_check_unsafe(b"cudaMalloc") == 0
    assert work.fake_capture_begin(stream, 0) == 0
    assert work.fake_check_unsafe(b"cudaMalloc") != 0
    assert work.fake_capture_end(stream, ctypes.byref(graph)) != 0 and not graph.value


def test_the_plugin_is_found_as_if_installed(tmp_path: Path) -> None:
    """Guards: a check that loads the plugin in another way than vLLM does."""
    check_packed.write_distribution(tmp_path)
    from importlib.metadata import distributions

    found = {(e.group, e.name): e.value for d in distributions(path=[str(tmp_path)]) for e in d.entry_points}
    assert found["vllm.general_plugins", "morphserve"] == "morphserve.plugin:register"


def test_settings_of_the_caller_stay_outside(tmp_path: Path) -> None:
    """Guards: a check that holds only because the caller had set what it checks."""
    base = {"VLLM_USE_V2_MODEL_RUNNER": "0", "MORPHSERVE_UNPROVEN_CUDA": "1", "PYTHONPATH": "/x", "PATH": "/bin"}
    found = check_packed.child_environment(tmp_path / "site", tmp_path, base)
    assert not {"VLLM_USE_V2_MODEL_RUNNER", "MORPHSERVE_UNPROVEN_CUDA"} & found.keys()
    assert found["PYTHONPATH"].split(":")[0] == str(tmp_path / "site") and found["PATH"] == "/bin"


def test_a_section_that_ends_early_does_not_hold() -> None:
    """Guards: rows that were never reached are counted as good ones."""
    line = json.dumps({"row": "one", "ok": True, "detail": ""}) + "\n"
    assert [r.ok for r in check_packed.rows_of("s", line, 0, "")] == [True]
    ended = check_packed.rows_of("s", line, -11, "words\nSegmentation fault")
    assert [r.ok for r in ended] == [True, False] and "Segmentation fault" in ended[1].detail
    assert [r.ok for r in check_packed.rows_of("s", "", 0, "")] == [False]
