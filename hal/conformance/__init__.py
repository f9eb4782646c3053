"""The suite that every backend proves itself in, in the tree or out of it.

    halyard conformance run --backend NAME [--level L0 ...] [--dtype ...] [--report DIR]
    pytest --pyargs halyard.hal.conformance --backend NAME

A kernel set's `capabilities` are claims. Cases are derived from them: a claimed cell that goes wrong
is a failure, one that isn't claimed is counted and shown as not claimed. Levels build on each other:

    L0 device and memory     L1 graph compilers      L2 KV blocks        L3 attention
    L4 models                L5 engine               L6 the HTTP surface

L0, L2 and L3 know nothing but the contract and live here. L1, L4, L5 and L6 need the layers above
and live beside what they test; `levels.py` names them, nothing here imports them.
"""
