"""The catalogue of machines: one small TOML file each, every figure with its source.

load.py     by name or by path, the whole catalogue, save
form.py     the TOML form: text to Machine, with every check
write.py    Machine to text
README.md   the form, for those who write their own
"""
