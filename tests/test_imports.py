"""What a module imports; `make lint` holds the order of rooms, this what runs across them."""

from graphlib import TopologicalSorter

import grimp


def test_no_module_imports_itself_through_others():
    """Imports inside functions count too."""
    graph = grimp.build_graph("digit", exclude_type_checking_imports=True, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 150
    assert any("digit.convert.upstream" in found for found in imported.values())  # which only a function imports
    TopologicalSorter(imported).prepare()  # raises with the cycle, if there is one
