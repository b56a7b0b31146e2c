"""An adversary for bnfuse: random networks, on each of which fusing must be exact.

``python -m fuzz --count 20000 --seed 0`` makes networks, fuses them in float64 and compares. A network is data
(:mod:`fuzz.program`); it prints as the program that builds it, so that a failure can be pasted as a test.

* :mod:`fuzz.generate` draws a network from a seed, out of :mod:`fuzz.operators` and :mod:`fuzz.blocks`.
* :mod:`fuzz.check` is the property; :mod:`fuzz.shrink` makes a failing network small.
* :mod:`fuzz.calls` draws a network with several calls (:mod:`fuzz.protocol`), on which it goes other ways than on the
  recorded one (:mod:`fuzz.kinds`); :mod:`fuzz.check_calls` is the property, ``python -m fuzz --calls`` the command.
* :mod:`fuzz.complete` looks for norms that could go but stay, by a search that shares nothing with bnfuse.
"""
