"""A model as a folder of C that needs no runtime: sources, one object file of kernels, weights, an example.

    from codegen.c_export.export import export

    export({"forward": graph, "step": step_graph}, params, targets.get("cpu"), "model_c")

The folder is compiled and run on its examples before it gets its name, by the host's compiler or under an emulator;
where neither can, `unverified` says why.
"""
