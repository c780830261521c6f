"""The nouns of narrows: frozen data, numpy at most, nothing of the rest of the package.

resource.py     Resource, Kind, Link           what a machine has
calibration.py  Calibration, Error             how far from its datasheet it was measured to run
machine.py      Machine                        a named set of resources
tensor.py       Codec, Tensor                  bytes, always derived
workload.py     Use, Op, Phase, Workload       a graph of ops over tensors
fusion.py       fuse                           what a plan's fusion removes from memory
plan.py         Plan                           how a workload is run
price.py        price, PhasePrice              seconds of every op, vectorised over cases
bound.py        Bound, bound                   the narrowest point, with its error
case.py         Case                           workload, plan and machine: what a user asks about
method.py       Method and its four roles      instrument, technique, simulator, searcher
claim.py        Claim                          one figure of a paper
errors.py       NarrowsError                   what is shown to a user in one sentence
"""
