"""Tensor products of equivariant features, in the conventions of e3nn with the basis of e3x.

    irreps.py       Irrep, texts such as "32x0e+16x1o", products of irreps
    couplings.py    Clebsch-Gordan couplings (NumPy, float64), spherical harmonics
    linear.py       IrrepsLinear, ElementLinear, ScalarNetwork; normalized activations
    gates.py        gated nonlinearity; conversion of features to e3x's layout
    convolution.py  sum of weighted products over the neighbors
    chunks.py       the convolution and its derivatives, on blocks of edges
    primitives.py   rules of automatic differentiation for them
    interaction.py  block of NequIP and SevenNet

    symmetric_contraction.py  products of several features of an atom (MACE, PACE)
    product_algebras.py       how these products are computed
    edge_booster.py           equivariant features of edges (PACE)
    element_features.py       first features, readouts and features of heads (MACE, PACE)

Features are a dict {Irrep: array (N, 2l + 1, channels)}. A layer of NequIP, for example:

    edge = pairs(graph)                                  # from receiver to sender
    distances = safe_norm(edge.displacements)
    harmonics = spherical_harmonics(unit_vectors(edge.displacements, distances), 2)
    gate = gate_for(parse("32x0e+32x1o"), features, natural(2))
    paths = convolution_paths(irreps_of(features), natural(2), dict(features))
    network = ScalarNetwork((64, num_weights(paths)), name="radial")
    weights = network.path_weights(rbf * envelope)       # once for each pair
    mixed = IrrepsLinear(irreps_of(features), name="linear_1")(features)
    summed = convolve(mixed, harmonics, weights, edge, paths)
    features = gate(IrrepsLinear(gate.inputs, name="linear_2")(summed))

Models whose vectors point to the receiver, such as MACE, take the harmonics of -displacements
(`opposite`). Weights of e3nn are used unchanged, with the normalization of e3nn.
"""
