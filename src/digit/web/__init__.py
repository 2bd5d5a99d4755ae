"""``digit serve``: a JSON API over one model (schema, service, jobs, app, security), and a static page that uses it."""
