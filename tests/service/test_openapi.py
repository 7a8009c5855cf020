from service import openapi
from service.app import ROUTES


def test_the_document_names_every_route_and_method():
    documented = {(path, method.upper()) for path, methods in openapi.document()["paths"].items() for method in methods}
    assert documented == {(route.path, method) for route in ROUTES for method in route.methods - {"HEAD"}}


def test_every_reference_leads_somewhere():
    document = openapi.document()
    references = [r.split('"')[0] for r in str(document).replace("'", '"').split("#/components/schemas/")[1:]]
    assert references
    assert set(references) <= set(document["components"]["schemas"])
