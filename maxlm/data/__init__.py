"""From documents to batches: tokenizers, sources, prepared folders of token shards, packing and the loader.

Only `maxlm.data.loader` imports jax, so that preparing data stays light.
"""
