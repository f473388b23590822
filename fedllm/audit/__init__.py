"""Attacks on what leaves a silo: each tells how much of the text can be had back, beside what mere guessing gets."""
