"""The instruction set that is used: the processor's, or the limit of oneDNN."""

import pytest
import torch

from topkd._runtime import processor

ZEN3 = {"sse4_1": True, "avx": True, "avx2": True}
ZEN4 = ZEN3 | {"avx512_bw": True, "avx512_vnni": True, "avx512_bf16": True}
SAPPHIRE = ZEN4 | {"avx_vnni": True, "avx512_fp16": True, "amx_bf16": True}


@pytest.mark.parametrize(
    ("flags", "limit", "expected", "bfloat16"),
    [
        (ZEN3, None, "AVX2", False),
        (ZEN3, "AVX512_CORE", "AVX2", False),
        (ZEN4, None, "AVX512_CORE_BF16", True),
        (ZEN4, "avx512_core", "AVX512_CORE", False),
        (ZEN4, "AVX2", "AVX2", False),
        (ZEN4, "AVX2_VNNI_2", "AVX2", False),
        (ZEN4, "SSE41", "SSE41", False),
        (ZEN4, "ALL", "AVX512_CORE_BF16", True),
        (SAPPHIRE, None, "AVX512_CORE_AMX", True),
        (SAPPHIRE, "AVX10_1_512", "AVX512_CORE_FP16", True),
    ],
)
def test_instruction_set(monkeypatch, flags, limit, expected, bfloat16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert processor.instruction_set() == expected
    assert processor.computes_bfloat16() is bfloat16


def test_other_architectures_have_no_set_of_x86(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True}, raising=False)
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    assert processor.instruction_set() == "arm64"
    assert not processor.computes_bfloat16()


def test_version_of_onednn_is_read():
    if not torch.backends.mkldnn.is_available():
        assert processor.onednn_version() == "none"
    else:
        assert f"v{processor.onednn_version()} " in torch.__config__.show()
