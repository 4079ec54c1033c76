"""The flow: one module per artifact, in the order they are made.

A stage module offers two functions:

- ``artifact(context, part)``: the folder, the settings and the input digests its fingerprint is made of;
- ``build(context, part, folder)``: make it, writing into ``folder`` only.
"""
