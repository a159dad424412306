"""Reports of the Force2Geo study: relaxed geometries and the tables of the paper."""
