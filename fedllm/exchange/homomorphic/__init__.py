"""Homomorphic encryption: the server adds up ciphertexts that it cannot read, and silos open the sum.

CKKS (Cheon, Kim, Kim and Song 2017, 2016/421 of the IACR) by Microsoft SEAL in `tenseal`; all silos hold one secret key
and the server none, and all tensors are encrypted or only some (FedML-HE, Jin et al. 2023, arXiv:2303.10837). Who has
the key and the server's messages reads every silo's update: `exchange.secure` needs no such key.

Read in this order: `settings` (what a recipe says), `ckks` (numbers to ciphertexts, their sum, and back), `packing` (an
update as numbers, with tags that show of whom a sum is), `messages`, the halves `silo` and `server`, and `middleware`.
"""
