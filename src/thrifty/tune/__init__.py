"""Tuning: the cheapest plan whose loss is bounded, and the certificate that says so.

A space of plans is searched on one part of the examples, what is frozen is tested on a second, untouched part, and a
third reports what was not tuned on. See `thrifty tune` and `thrifty verify`.
"""
