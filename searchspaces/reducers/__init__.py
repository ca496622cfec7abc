"""Reducers: fewer tokens between the branches of a layer, a file each."""
