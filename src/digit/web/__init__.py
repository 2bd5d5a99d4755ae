"""``digit serve``: a JSON API over one model, and a static page that uses it.

schema     what the API takes and gives, as types
jobs       one worker, and a bounded queue before it
service    what can be asked of a model; knows nothing of HTTP
app        the service over HTTP, with FastAPI
security   size of requests, password, other web sites
static     the page: HTML, CSS and JavaScript without a build step, and sample images
"""
