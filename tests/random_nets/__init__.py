"""Random small networks for property tests of tracing, closing and removing.

A network is built from a *recipe*: a list of `(name, options)` pairs. Every block takes whatever
tensor the block before it gives (it is built on an example of that tensor), so every recipe is a
valid network, recipes nest, and hypothesis can shrink them freely. `repr(network)` is the call that
builds it again.

The blocks cover what real networks do to channels, and also what they should not do but somebody
will: slices at fixed positions, views of fixed sizes, in-place writes into slices, channels folded
into the batch, operators nobody has heard of. All parameters and running statistics are random and
none is zero, so a wrong zero shows in the output.
"""

from .drawing import CLASSES, INPUT_SHAPE, RandomNet, networks
from .functions import FIXED, FUNCTIONS, MOVING, SAFE, UNSAFE
