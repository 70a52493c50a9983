"""What a product takes as its weight: a plain array, or one that says how to multiply by it.

kinds.py: the union of them all
by_channel.py: 8 bits, integers or floats, with a scale for each output
by_group.py: 4 or 8 bits with a scale for every few inputs
normal_float.py: NF4
by_row.py: what several adapters make of a weight, each for its own rows
by_layer.py: the weights of all layers, for a loop on a CPU
low_rank.py: a weight, and what an adapter adds to it
around.py: a weight, and what an adapter does before and after its product
narrow.py: a float32 weight whose products are computed in 8 bits while it is trained
watched.py: a plain weight that tells what it was multiplied with
holding.py: which weight of a model becomes what, where it lies and what it is called in files
"""
