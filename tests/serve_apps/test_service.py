import pytest

pytestmark = pytest.mark.slow


def test_smoke(service, speech):
    import httpx
    c = service.client()
    print(httpx.get(service.base_url + "/healthz").text)
    r = c.chat.completions.create(**service.body("Hello"))
    print(r)
