"""How a torch module, a Hugging Face configuration or a training step becomes a Workload.

config.py      TransformerConfig, shape  the shape of a transformer; shipped ones by name
families.py    read                      how each family words its config.json
shapes.toml                              the shipped catalogue of public configurations
llm.py         llm                       the closed form: no torch, one case or thousands
weights.py     weight_tensors            the weights of a configuration as tensors
layers.py      layer, Cache, Span        one block, over a cache of keys and values
blocks.py      Builder                   the kernels of a block, as eager frameworks run them
training.py    training_step             forward, backward and optimiser in closed form
module.py      trace                     any torch module or callable, on meta tensors
generation.py  trace_generation          prefill and decode of a causal language model
recorder.py    Recorder                  the kernels of a run, over the storages they touch
modes.py       Dispatch, Functions       what stands between torch and the kernels meanwhile
aten.py        kind_of, flops            op class and operations of a torch kernel
patterns.py    mark_attention            attention written out in several kernels
fold.py        fold                      repeated layers become one block that runs so many times

Only module, generation, recorder, modes and aten need torch.
"""
