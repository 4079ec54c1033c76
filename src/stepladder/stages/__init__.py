"""The flow: one module per artifact, in the order they are made.

A stage module offers three functions:

- ``parts(config)``: the folders it makes, ``(None,)`` for one, or one name per member;
- ``artifact(context, part)``: the folder, the settings and the input digests its fingerprint is made of;
- ``build(context, part, folder)``: make it, writing into ``folder`` only.
"""
