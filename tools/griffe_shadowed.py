"""Let `make docs` find functions that have the name of a submodule beside them, such as `diffstride.convert.plan`."""

import griffe


class ShadowedFunctions(griffe.Extension):
    """Keep a function that griffe replaces by a submodule of the same name, as `NAME_function`."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: object) -> None:
        parent = func.parent
        if parent is not None and parent.is_init_module and (parent.filepath.parent / f"{func.name}.py").exists():
            parent.set_member(f"{func.name}_function", func)
