"""Measuring on another machine: a server on the device, and a client that sends artifacts to it.

The device needs numpy, this project and the TVM runtime: what `codegen.devices.serve` imports is neither the compiler
nor torch. It times with the same `codegen.measure` that the searching machine would use.
"""
