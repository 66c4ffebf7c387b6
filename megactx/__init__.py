"""megactx: train and sample small GPTs over several aligned token streams, with fused kernels underneath.

The package body stays empty on purpose: `import megactx.kernels` must not pull in the trainer, and
`megactx --help` must answer before torch is loaded.
"""

__version__ = "0.1.0"
