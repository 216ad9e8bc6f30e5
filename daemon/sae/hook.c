/* Names of hook points (formats.md section 3). Thread: any. Memory: none. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "daemon/model/config.h"
#include "daemon/sae/sae_file.h"

static const struct {
    const char *suffix;
    spurion_hook_site site;
} sites[] = {{".hook_resid_pre", SPURION_HOOK_PRE},
             {".hook_resid_mid", SPURION_HOOK_MID},
             {".hook_resid_post", SPURION_HOOK_POST},
             {".hook_attn_out", SPURION_HOOK_ATTN_OUT},
             {".hook_mlp_out", SPURION_HOOK_MLP_OUT}};

/* Prefixes of "PREFIX L" forms that mean what stands beside them at layer L. */
static const struct {
    const char *prefix;
    spurion_hook_site site;
} modules[] = {{"transformer.h.", SPURION_HOOK_POST},        {"model.layers.", SPURION_HOOK_POST},
               {"gpt_neox.layers.", SPURION_HOOK_POST},      {"layers.", SPURION_HOOK_POST},
               {"h.", SPURION_HOOK_POST},                    {"resid_post_layer_", SPURION_HOOK_POST},
               {"attention_out_layer_", SPURION_HOOK_ATTN_OUT}, {"mlp_out_layer_", SPURION_HOOK_MLP_OUT}};

/* Reads decimal digits; gives what stands after them, NULL when there are none or the layer is none. */
static const char *read_layer(int *layer, const char *text)
{
    const char *at = text;

    *layer = 0;
    while (*at >= '0' && *at <= '9' && *layer < SPURION_LAYERS_MAX) {
        *layer = *layer * 10 + (*at++ - '0');
    }
    return at > text && *layer < SPURION_LAYERS_MAX ? at : NULL;
}

static bool parse_blocks(spurion_hook *out, const char *name)
{
    const char *rest;

    if (strncmp(name, "blocks.", 7) != 0) {
        return false;
    }
    rest = read_layer(&out->layer, name + 7);
    for (size_t i = 0; rest != NULL && i < sizeof sites / sizeof *sites; i++) {
        if (strcmp(rest, sites[i].suffix) == 0) {
            out->site = sites[i].site;
            return true;
        }
    }
    return false;
}

/* What may follow a block's path: a module of it, whose output is meant. */
static const struct {
    const char *suffix;
    spurion_hook_site site;
} parts[] = {{"", SPURION_HOOK_POST},
             {".output", SPURION_HOOK_POST},
             {".mlp", SPURION_HOOK_MLP_OUT},
             {".mlp.output", SPURION_HOOK_MLP_OUT},
             {".post_feedforward_layernorm.output", SPURION_HOOK_MLP_OUT}, /* Gemma: what is added */
             {".self_attn", SPURION_HOOK_ATTN_OUT},
             {".attention", SPURION_HOOK_ATTN_OUT},
             {".attn", SPURION_HOOK_ATTN_OUT}};

static bool parse_module(spurion_hook *out, const char *name)
{
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        size_t n = strlen(modules[i].prefix);
        const char *rest = strncmp(name, modules[i].prefix, n) == 0 ? read_layer(&out->layer, name + n) : NULL;

        out->site = modules[i].site;
        if (rest != NULL && *rest == '\0') {
            return true;
        }
        for (size_t k = 0; rest != NULL && modules[i].prefix[n - 1] == '.' && k < sizeof parts / sizeof *parts; k++) {
            if (strcmp(rest, parts[k].suffix) == 0) {
                out->site = parts[k].site;
                return true;
            }
        }
    }
    return false;
}

spurion_status spurion_hook_parse(spurion_hook *out, const char *name)
{
    static const char *const known = "blocks.L.hook_resid_post, hook_resid_pre, hook_resid_mid, hook_attn_out or hook_mlp_out, or "
                                     "transformer.h.L, model.layers.L, gpt_neox.layers.L, layers.L, h.L, resid_post_layer_L (output of block L), "
                                     "with .mlp or .self_attn behind them (output of that module)";

    memset(out, 0, sizeof *out);
    if (parse_blocks(out, name) || parse_module(out, name)) {
        return spurion_ok();
    }
    memset(out, 0, sizeof *out);
    if (strstr(name, "hook_z") != NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "hook: expected a point of the residual stream or what is added to it, found \"%.80s\": "
                             "SAEs on attention heads (hook_z) are not read; one of hook_attn_out or of the residual stream is", name);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "hook: expected %s, found \"%.100s\"", known, name);
}

void spurion_hook_name(char *out, size_t bytes, spurion_hook hook)
{
    for (size_t i = 0; i < sizeof sites / sizeof *sites; i++) {
        if (sites[i].site == hook.site) {
            snprintf(out, bytes, "blocks.%d%s", hook.layer, sites[i].suffix);
        }
    }
}
