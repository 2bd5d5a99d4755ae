"""The page of ``digit serve`` and its JSON API.

limits    one worker, a waiting room with few chairs, and what a request may ask for
uploads   pictures from strangers
service   what can be asked, as plain functions over the pipeline; knows nothing of the web
api       the functions as JSON                page, markup    the functions as a Gradio page
guard     what stands before both: size of requests, password, other web sites
server    everything put together, and the command's server
"""
