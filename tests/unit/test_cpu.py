"""The instructions that a figure names."""

import platform
import resource

import pytest

from engine import cpu


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 fma", ["AVX2"]),
        ("flags : avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_int8", ["AVX2", "AVX-512", "VNNI", "bf16", "AMX"]),
        ("flags : avx2 avx_vnni", ["AVX2", "VNNI"]),
        ("Features\t: fp asimd asimddp i8mm bf16", ["bf16", "NEON", "dot product", "i8mm"]),
        ("model name : avx2", []),
    ],
)
def test_instructions_are_read_from_the_flags_of_the_first_processor(line, found, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{line}\n\nprocessor : 1\nflags : avx512f\n"[: None if found else 40])
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.instructions() == found


def test_a_system_that_says_nothing_has_no_known_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert cpu.instructions() == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_memory_that_is_freed_is_taken_again_without_new_pages():
    cpu.keep_freed_memory()

    def faults_of(count=40, size=1 << 20):  # pieces too small for huge pages
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [b"x" * size for _ in range(count)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, len(pieces) * size

    for _ in range(2):
        faults_of()
    faults, size = faults_of()
    assert faults < size / resource.getpagesize() / 10
