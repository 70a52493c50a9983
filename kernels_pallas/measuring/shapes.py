"""The list of cases, each with what is expected of it on an H200."""

from __future__ import annotations

from dataclasses import replace

from kernels_pallas import masks
from kernels_pallas.measuring.cases import AttentionCase, Case, GluCase, Goal, GroupedCase, PagedCase

# Set before any kernel was timed, from what the best published kernels of this kind reach on an H100 (docs/kernels.md).
_CUDNN = ("cudnn",)
_FORWARD = {
    64: Goal(0.80, 0.88, 0.95, _CUDNN),
    128: Goal(0.85, 0.95, 1.00, _CUDNN),
    256: Goal(0.88, 0.97, 1.00, _CUDNN),
}
_SHORT = Goal(0.75, 0.87, None, _CUDNN)
_BACKWARD = Goal(0.70, 0.85, 0.95, _CUDNN)
_PACKED = Goal(1.5, 2.5, None, _CUDNN)
_WIDE_KEYS = Goal(1.2, 1.7, None, _CUDNN)
_GLU = Goal(0.95, 1.02, 1.06, ("xla", "xla concatenated"))
_GLU_NARROW = Goal(1.5, 2.0, 2.4, ("xla", "xla concatenated"))
_MLP = Goal(1.00, 1.08, 1.15, ("xla", "xla concatenated"))

_LENGTHS = ((16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384))
_WIDTHS = ((4096, 11008), (4096, 14336), (2048, 5632), (8192, 28672))

_BASE = AttentionCase(direction="forward", B=4, T=4096, N=32, K=8, H=128, Hv=128, goal=_FORWARD[128])
_PACKED_BASE = replace(_BASE, documents=(1300, 700, 1450, 646), goal=_PACKED)  # boundaries off every block's edge


def attention_cases() -> list[AttentionCase]:
    """16384 tokens and a model width of 4096 in each; the most telling first, in case time runs out."""
    cases = [_BASE, replace(_BASE, direction="backward", goal=_BACKWARD)]
    cases += [_PACKED_BASE, replace(_PACKED_BASE, direction="backward")]
    for H, N, K in ((128, 32, 8), (64, 64, 16), (256, 16, 4)):
        for B, T in _LENGTHS:
            case = replace(_BASE, B=B, T=T, N=N, K=K, H=H, Hv=H, goal=_SHORT if T <= 1024 else _FORWARD[H])
            cases.append(case)
            if H == 128:
                # What is known of others' backward passes begins at 4096.
                cases.append(replace(case, direction="backward", goal=_BACKWARD if T >= 4096 else None))
    window = replace(_BASE, B=2, T=8192, mask=masks.causal & masks.local(1023, 0), goal=None)
    cases += [window, replace(window, direction="backward")]
    cases.append(replace(_BASE, N=16, K=16, H=192, Hv=128, goal=_WIDE_KEYS))
    cases.append(replace(_BASE, soft_cap=50.0, goal=None))
    return list(dict.fromkeys(cases))


def glu_cases() -> list[GluCase]:
    """Widths of LLaMA 7B, Llama 3 8B, TinyLlama and Llama 3 70B, and one so narrow that memory traffic decides."""
    base = GluCase(op="fused_glu", direction="forward", M=8192, D=4096, F=11008, goal=_GLU)
    both = replace(base, op="fused_glu_mlp", direction="forward and backward", goal=_MLP)
    cases = [base, both]
    for D, F in _WIDTHS:
        cases += [replace(base, M=M, D=D, F=F, goal=_GLU if M >= 4096 else None) for M in (8192, 32768, 4096, 1024)]
        cases.append(replace(both, D=D, F=F))
    cases.append(replace(base, M=65536, D=128, F=512, goal=_GLU_NARROW))
    return list(dict.fromkeys(cases))


def grouped_cases() -> list[GroupedCase]:
    """Experts of Mixtral 8x7B, Qwen3 30B-A3B and DeepSeekMoE 16B. Without goals, as there is no GPU kernel yet."""
    cases = []
    for M, D, F, E in ((16384, 4096, 14336, 8), (65536, 2048, 768, 128), (49152, 2048, 1408, 64)):
        forward = GroupedCase(direction="forward", M=M, D=D, F=F, E=E)
        cases += [forward, replace(forward, direction="forward and backward")]
    return cases


def paged_cases() -> list[PagedCase]:
    """Decoding of Llama 3 8B, of Qwen3 30B-A3B, and with a window; texts of all lengths up to
    `longest`. Without goals: we know of no figures of others to set them by."""
    base = PagedCase(T=64, longest=2048, N=32, K=8, H=128)
    cases = [base, replace(base, K=4), replace(base, longest=16384, mask=masks.local(1023, 0))]
    return [*cases, replace(base, T=8, longest=16384), replace(base, T=256, longest=512)]


def quick_cases(op: str) -> list[Case]:
    """The first of the list, which stand for the rest."""
    if op == "attention":
        return list(attention_cases()[:4])
    if op == "paged":
        return list(paged_cases()[:2])
    return list(glu_cases()[:2] if op == "glu" else grouped_cases()[:2])


def tiny(case: Case) -> Case:
    """The same case at a size that any CPU computes at once, without a goal: to try the command, not the kernel."""
    if isinstance(case, GluCase):
        return replace(case, M=32, D=16, F=48, goal=None)
    if isinstance(case, GroupedCase):
        return replace(case, M=32, D=16, F=48, E=4, goal=None)
    if isinstance(case, PagedCase):
        return replace(case, T=3, longest=50, N=4, K=2, H=16, goal=None)
    documents = (41, 22, 45, 20) if case.documents else None
    return replace(case, B=1, T=128, N=4, K=2, H=16, Hv=16, documents=documents, goal=None)
