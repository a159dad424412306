"""Layers of models whose messages belong to directed edges: DimeNet++ and SphereNet."""
