"""Attention as cascades of extended Einsums, from three passes over the keys to one.

Ranks: e, f channels of queries and values, p queries, m keys (m1 chunks of m0). Texts follow
Nayak et al. 2024, "FuseMax", section IV (the taxonomy) and its figure of the one-pass cascade.
"""

from __future__ import annotations

from narrows.core.cascade import Cascade, parse

THREE_PASS = """
QK[m, p] = Q[e, p] * K[e, m]
M[p] = QK[m, p] :: max
SN[m, p] = exp(QK[m, p] - M[p])
SD[p] = SN[m, p]
A[m, p] = SN[m, p] / SD[p]
AV[f, p] = A[m, p] * V[f, m]
"""
"""Numerically stable softmax as it is written: FLAT and unfused attention."""

TWO_PASS = """
BK[e, m1, m0] = K[e, m1*M0 + m0]
BV[f, m1, m0] = V[f, m1*M0 + m0]
QK[m1, m0, p] = Q[e, p] * BK[e, m1, m0]
LM[m1, p] = QK[m1, m0, p] :: max
SLN[m1, m0, p] = exp(QK[m1, m0, p] - LM[m1, p])
SLD[m1, p] = SLN[m1, m0, p]
GM[p] = LM[m1, p] :: max
PLM[m1, p] = exp(LM[m1, p] - GM[p])
SD[p] = SLD[m1, p] * PLM[m1, p]
A[m1, m0, p] = SLN[m1, m0, p] * PLM[m1, p] / SD[p]
AV[f, p] = A[m1, m0, p] * BV[f, m1, m0]
"""
"""Maxima and sums of chunks, corrected once the global maximum is known."""

ONE_PASS = """
BK[e, m1, m0] = K[e, m1*M0 + m0]
BV[f, m1, m0] = V[f, m1*M0 + m0]
RM[0, p] = -inf
RD[0, p] = 0
RNV[0, f, p] = 0
QK[m1, m0, p] = Q[e, p] * BK[e, m1, m0]
LM[m1, p] = QK[m1, m0, p] :: max
RM[m1+1, p] = max(RM[m1, p], LM[m1, p])
SLN[m1, m0, p] = exp(QK[m1, m0, p] - RM[m1+1, p])
SLD[m1, p] = SLN[m1, m0, p]
SLNV[m1, f, p] = SLN[m1, m0, p] * BV[f, m1, m0]
PRM[m1, p] = exp(RM[m1, p] - RM[m1+1, p])
SPD[m1, p] = RD[m1, p] * PRM[m1, p]
RD[m1+1, p] = SLD[m1, p] + SPD[m1, p]
SPNV[m1, f, p] = RNV[m1, f, p] * PRM[m1, p]
RNV[m1+1, f, p] = SLNV[m1, f, p] + SPNV[m1, f, p]
AV[f, p] = RNV[M1, f, p] / RD[M1, p]
"""
"""Running maximum, denominator and numerator: FlashAttention-2 and FuseMax."""

ATTENTION = {"three_pass": THREE_PASS, "two_pass": TWO_PASS, "one_pass": ONE_PASS}


def attention(name: str) -> Cascade:
    """One of the three, parsed."""
    return parse(ATTENTION[name])
