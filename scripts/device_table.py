#!/usr/bin/env python3
"""Write the table of docs/devices.md: what is shown for each target, and by which test.

Run it after a change below: python scripts/device_table.py. A test checks that it was done and that
the tests are there. A new target is a row of `ROWS`; a new proof is a name in one of its cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "devices.md"
BEGIN = "<!-- made by scripts/device_table.py; do not edit -->"
END = "<!-- end of the table -->"


class Cell(NamedTuple):
    """What is so, in a word or two, and the tests that show it, as `file::name` below tests/."""

    text: str
    tests: tuple[str, ...] = ()


_NO = Cell("no")


class Row(NamedTuple):
    """A target. In the order of the columns."""

    device: str
    code_for: str
    compiles: Cell
    links: Cell = _NO
    runs_in_ci: Cell = _NO
    runs_on_device: Cell = _NO


COLUMNS = ("`--device`", "code for", "compiles", "links", "runs in CI", "runs on the device")

_PARITY = "models/test_parity.py::test_logits_equal_the_reference"
_OTHER_CPUS = "compiler/test_other_cpus.py::test_models_compile_for_other_cpus"
_CODE = "compiler/test_gpu_libraries.py::test_code_is_made"
_HOSTS = "compiler/test_gpu_libraries.py::test_hosts_of_gpus"
_FORMS = "compiler/test_gpu_libraries.py::test_forms_of_output"
_OBJECTS = "compiler/test_gpu_libraries.py::test_objects_for_other_systems"
_ZIG = "compiler/test_gpu_libraries.py::test_zig_links_where_no_cross_compiler_is"
_REFUSED = "compiler/test_gpu_libraries.py::test_unknown_devices_are_refused"
_STATIC = "compiler/test_system_libraries.py::test_code_for_phones"
_PHONES = "prepare/test_package.py::test_an_app_for_phones"
_ARCHIVE = "prepare/test_package.py::test_one_archive_of_all_libraries"
_WEB = "browser/test_web_llm.py::test_greedy_text_equals_the_cpu"
_NODE = "browser/test_cpu_in_node.py::test_greedy_text_equals_the_cpu"
_CUDA = "kernels/gpu/test_cuda_machine_code.py::test_kernels_of_models_fit"
_CUDA_SOURCE = "kernels/gpu/test_cuda_attention.py::test_attention"
_GPU = "models/test_gpu_forward.py::test_logits_equal_the_reference"
_ON_GPU = Cell("where there is one", (_GPU,))
ROWS = (
    Row(
        "`cpu`, `x86-64-v3`, `znver4`, ...",
        "x86-64 on Linux",
        Cell("yes", (_PARITY, _OTHER_CPUS)),
        Cell("`.so`", ("acceptance/test_small_model.py::test_the_documented_sequence",)),
        Cell("yes", (_PARITY, "acceptance/test_small_model.py::test_200_greedy_tokens_from_bos")),
        Cell("yes", (_PARITY,)),
    ),
    Row(
        "`aarch64`, `aarch64+dotprod`, `neoverse-n1`, ...",
        "AArch64 on Linux",
        Cell("yes", (_OTHER_CPUS,)),
        Cell("`.so`", ("compiler/test_other_cpus.py::test_linking_for_another_architecture",)),
        Cell(
            "kernels, emulated",
            (
                "kernels/cpu/test_int8_aarch64.py::test_products_are_exact",
                "kernels/cpu/test_attention_aarch64.py::test_steps_do_not_matter",
            ),
        ),
        Cell("the same tests as x86-64", (_PARITY,)),
    ),
    Row(
        "`riscv64`",
        "RISC-V with doubles, on Linux",
        Cell("yes", ("compiler/test_gpu_libraries.py::test_risc_v_has_registers_for_floats",)),
        Cell("a linker is found", (_ZIG,)),
    ),
    Row(
        "`x86-64-v3` with `--host x86_64-pc-windows-msvc`",
        "x86-64 on Windows",
        Cell("`.tar`", (_OBJECTS,)),
        Cell("on Windows only", (_FORMS, _ZIG)),
    ),
    Row(
        "`apple-m1`, ...",
        "AArch64 on macOS; with `--host arm64-apple-ios` on iOS",
        Cell("`.tar`", (_OTHER_CPUS, _FORMS)),
        Cell("on a Mac only", (_OTHER_CPUS,)),
    ),
    Row(
        "`wasm32`",
        "WebAssembly with 128-bit vectors, in node",
        Cell("yes", (_NODE,)),
        Cell("`.wasm`", (_NODE,)),
        Cell("no: Emscripten is not there; `make browser`"),
        Cell("yes", (_NODE,)),
    ),
    Row(
        "`cuda:sm_90`, ...",
        "NVIDIA GPUs",
        Cell("yes", (_CODE, "compiler/test_gpu_libraries.py::test_cuda_architectures")),
        _NO,
        Cell("kernels, as CUDA source on a CPU; its machine code is read", (_CUDA_SOURCE, _CUDA)),
        _ON_GPU,
    ),
    Row(
        "`metal`",
        "Apple GPUs",
        Cell("`.tar`", (_CODE,)),
        Cell("on a Mac only", (_FORMS,)),
        _NO,
        _ON_GPU,
    ),
    Row(
        "`opencl`",
        "OpenCL GPUs",
        Cell("yes", (_CODE,)),
        Cell("`.so`", ("models/test_gpu_forward.py::test_a_linked_library_runs",)),
        Cell("on a CPU, by pocl", (_GPU,)),
        _ON_GPU,
    ),
    Row(
        "`rocm:gfx1100`, ...",
        "AMD GPUs",
        Cell("needs ROCm's device libraries"),
    ),
    Row(
        "`vulkan`",
        "",
        Cell("refused: TVM's packages on PyPI are built without it", (_REFUSED,)),
    ),
    Row(
        "`webgpu`",
        "browsers",
        Cell("yes", (_CODE,)),
        Cell("`.wasm`", (_WEB,)),
        Cell(
            "kernels, on Vulkan",
            (
                "kernels/gpu/test_wgsl_kernels.py::test_product_with_quantized_weights",
                "kernels/gpu/test_wgsl_kernels.py::test_norm_of_parts",
            ),
        ),
        Cell(
            "by `make browser`, in Chromium, whose WebGPU may compute on the CPU",
            (
                _WEB,
                "browser/test_web_llm.py::test_quantized_text_equals_the_cpu",
                "browser/test_example_page.py::test_the_page_works_without_a_network",
            ),
        ),
    ),
    Row(
        "`android`",
        "OpenCL GPUs of phones",
        Cell("`.tar`", (_STATIC, _PHONES, _HOSTS)),
        Cell("`.a`, by `package`", (_ARCHIVE,)),
    ),
    Row(
        "`iphone`",
        "Apple GPUs of phones",
        Cell("`.tar`", (_STATIC,)),
        Cell("`.a`, by `package`", (_ARCHIVE,)),
    ),
)


def render_table() -> str:
    """Return the table and the list of its tests."""
    numbers: dict[str, int] = {}
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for row in ROWS:
        lines.append(_line([row.device, row.code_for, *(_cell(c, numbers) for c in row[2:])]))
    tests = [f"{number}. `tests/{name}`" for name, number in numbers.items()]
    return "\n".join([*lines, "", "Numbers are of these tests:", "", *tests])


def render_page(text: str) -> str:
    """Return the page with the table in its place."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    assert mark, f"{PAGE} has lost {END}"
    return f"{head}{BEGIN}\n\n{render_table()}\n\n{END}{tail}"


def named_tests() -> list[str]:
    """Return every test that a cell names."""
    return [name for row in ROWS for cell in row[2:] for name in cell.tests]


def _cell(cell: Cell, numbers: dict[str, int]) -> str:
    marks = [str(numbers.setdefault(name, len(numbers) + 1)) for name in cell.tests]
    return f"{cell.text} ({', '.join(marks)})" if marks else cell.text


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
