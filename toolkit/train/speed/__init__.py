"""The fast path of training: frozen products with the adapter inside, compiled layer by layer.

``choose.py`` decides without torch what a run uses; everything else here is worker code. Each part
has a plain path beside it, and a test that holds the two against each other.
"""
