"""Key-value caches: what is kept of a prompt, how it is stored, and where.

_base.py          KVTechnique, Policy     the convention every member follows; no torch
adapter.py        KVCache, wrap           the seam to Hugging Face transformers (5.2 to newest)
chunked.py        prefill                 a prompt read in chunks, so that memory has a bound
stack.py          Stack                   a policy's choice, a codec and a tier as one technique
saved.py          save, restore           a cache in a file, and back
quality.py        recall, perplexity      what caches forget, from one reading of each prompt
baselines.py      RandomEviction, ...     policies to compare against at equal bytes

A layer's cache is a store; a store is made of parts:
store_torch.py    Store, attend           what one layer holds in place, and attention over it
store_packed.py   PackedStore             a body of codes and a residual in full precision
body.py           Body, Tail, Segment     tokens in a codec and a tier; recent tokens in full
codec.py          Codec, Affine, Packed   how an element is written: bits, a minimum and a scale
tier.py           Device, Host, Drive     where bytes live, what it costs to fetch them, counted
ragged.py         Ragged                  heads that hold unequal numbers of tokens
lowrank.py        LowRank                 a codec of few channels, each head of a rank of its own
attend_packed.py  packed, dense, merge    attention over codes as they lie (attend_packed.c)
select_torch.py   window_votes, top       votes for tokens, and the choice among them
_coded.py         Coding, coded, in_full  a coded cache as a workload sees it
_training.py      remember, resumed       a training that was cut short goes on
native.py         library, shared         C loops built for one shape and processor (pack_affine.c)

One system a file, beside its own siblings (KEY_*.py, and _KEY_case.py: what it makes of a case):
snapkv.py         SnapKV                  keeps the prompt tokens the last queries look at
kivi.py           KIVI                    keys and values in 2 bits, recent ones in full
bfp.py            BFP                     blocks that share an exponent, key channels sorted
instinfer.py      InstInfer               attention inside drives, over flash pages (instinfer_*.py)
alisa.py          ALISA, schedule         recent and lately important tokens, the rest elsewhere
zipvl.py          ZipVL                   prefill among important tokens, which get more bits
kvprediction.py   KVPrediction            a small model reads the prompt and predicts the cache
locret.py         Locret                  trained heads choose while a prompt is read in chunks
matryoshkakv.py   MatryoshkaKV            fewer channels, in a trained orthogonal basis of each head
"""
