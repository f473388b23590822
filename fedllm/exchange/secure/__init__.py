"""Secure aggregation: the server learns the sum of the silos' updates and nothing of any one of them.

Bonawitz et al. 2017 (CCS, doi:10.1145/3133956.3133982) on the sparse graph of Bell et al. 2020 (CCS, SecAgg+,
arXiv:2020/704 of the IACR). Every pair of neighbours agrees on a mask that one adds and the other subtracts, and every
silo adds a mask of its own; both kinds can be rebuilt from shares that its neighbours hold, but never both of one silo.

Read in this order: `settings` (who and how many), `graph` (who is whose neighbour), `keys` (what each silo makes and
agrees on), `shares` (who holds what of it), `masks` and `fixed_point` (numbers modulo 2^bits), `beside` (what is
added up with an update), `noise` (each silo's
part of it), `messages`, then the two halves `silo` and `server`, and `middleware`, which puts them around an exchange.
"""
