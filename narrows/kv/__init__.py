"""Key-value caches: what is kept of a prompt, how it is stored, and where.

_base.py          KVTechnique, Policy     the convention every member follows; no torch
snapkv.py         SnapKV                  keeps the prompt tokens the last queries look at
baselines.py      RandomEviction, ...     policies to compare against at equal bytes
quality.py        recall, perplexity      what caches forget, from one reading of each prompt
kivi.py           KIVI                    keys and values in 2 bits, recent ones in full
_coded.py         in_full, coded          a coded cache as a workload sees it
codec.py          Affine, Packed          codes of few bits, a minimum and a scale a group
store_packed.py   PackedStore             a body of codes and a residual in full precision
attend_packed.py  packed, dense, merge    attention over codes as they lie (attend_packed.c)
store_torch.py    Store, attend           what one layer holds in place, and attention over it
select_torch.py   window_votes, top       votes for tokens, and the choice among them
adapter.py        KVCache, wrap           the seam to Hugging Face transformers (5.2 to newest)
"""
