"""Information: how many bits get through a layer, a code or an estimate.

_base.py               entropy, information   exact figures of tables, in bits
coupling.py            encode, couple         codes of limited entropy, couplings of least
courier.py             Courier                a message in the symbols of a model
coding_game.py         Grid, play             ... in the moves of an agent that must play well
mecb.py                MECB                   couples two laws through a code of limited rate
source.py              Source, sphere_rule    inputs and labels of known information
ruler.py               cut                    activations to symbols that can be counted
bottleneck.py          ib_curve               the most label bits for every input bit
information_plane.py   InformationPlane       bits that each layer keeps of input and label
probe_torch.py         activations, Recorder  layers of a torch module, once or along a training
networks_torch.py      train                  small networks, many seeds side by side
"""
