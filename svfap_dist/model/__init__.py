"""The networks: masked autoencoder of pre-training, classifier of fine-tuning, and their encoders.

Start with `autoencoder.MaskedAutoencoder`; its forward pass leads through `patches`, `encoder` and
`layers`, and `loss` makes its targets. `sizes` has the table of encoders (`ENCODERS`) and the named
sizes, `flops` counts operations, `weights` reads and writes files, `convert` imports released
weights.
"""
