"""Policies that sample: noise schedules, networks, and the tables of steps that stand for a sampler on the device."""
