"""The networks: masked autoencoder of pre-training, classifier of fine-tuning, and their encoders.

Start with `autoencoder.MaskedAutoencoder`: its forward pass leads through `patches`, which also has
targets and loss, `encoder` and `layers`. `sizes` has the table of encoders (`ENCODERS`) and the
named sizes, `flops` counts operations, `weights` reads and writes files with their `info`, and
`convert` imports released weights.
"""
