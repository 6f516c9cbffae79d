{{- /*
What a hook needs besides its Job's own container: an account with a Role per namespace.
Arguments: context, component, events (of Helm), rules (YAML of the Role in each watched namespace),
ownRules (YAML of rules in the release's namespace only; may be empty).
*/ -}}
{{- define "tidegate.hookAccount" -}}
{{- $arguments := . }}
{{- $name := printf "%s-%s" (include "tidegate.fullname" .context) .component }}
{{- $own := .context.Release.Namespace }}
{{- $labels := include "tidegate.labels" . }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ $name }}
  namespace: {{ $own }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "tidegate.hook" (dict "events" .events "weight" "-10") | nindent 4 }}
{{- range $namespace := append (include "tidegate.namespaces" .context | fromJsonArray) $own | uniq }}
{{- $rules := list }}
{{- if has $namespace (include "tidegate.namespaces" $arguments.context | fromJsonArray) }}
{{- $rules = append $rules $arguments.rules }}
{{- end }}
{{- if eq $namespace $own }}
{{- $rules = append $rules $arguments.ownRules }}
{{- end }}
{{- with compact $rules }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "tidegate.hook" (dict "events" $arguments.events "weight" "-10") | nindent 4 }}
rules:
  {{- range . }}
  {{- . | trim | nindent 2 }}
  {{- end }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "tidegate.hook" (dict "events" $arguments.events "weight" "-10") | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ $own }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Arguments: events, weight. What a failed hook leaves is there to be looked at, until the next run. */ -}}
{{- define "tidegate.hook" -}}
helm.sh/hook: {{ .events }}
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- /*
A Job of the operator's image. Arguments: context, component, events, seconds (its limit), command (list),
configMap (mounted at /etc/tidegate/hook; may be empty).
*/ -}}
{{- define "tidegate.hookJob" -}}
{{- $name := printf "%s-%s" (include "tidegate.fullname" .context) .component }}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ $name }}
  namespace: {{ .context.Release.Namespace }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
  annotations:
    {{- include "tidegate.hook" (dict "events" .events "weight" "0") | nindent 4 }}
spec:
  backoffLimit: 2
  activeDeadlineSeconds: {{ .seconds }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" . | nindent 8 }}
    spec:
      serviceAccountName: {{ $name }}
      enableServiceLinks: false
      restartPolicy: Never
      {{- include "tidegate.pullSecrets" .context | nindent 6 }}
      securityContext:
        {{- include "tidegate.podSecurity" 65532 | nindent 8 }}
      {{- include "tidegate.placement" .context.Values.operator | nindent 6 }}
      containers:
        - name: {{ .component }}
          image: {{ include "tidegate.image" (dict "context" .context "name" "operator") | quote }}
          imagePullPolicy: {{ .context.Values.image.pullPolicy }}
          command:
            {{- toYaml .command | nindent 12 }}
          {{- with .context.Values.operator.extraEnv }}
          env:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          resources:
            requests: {cpu: 50m, memory: 96Mi}
            limits: {memory: 256Mi}
          securityContext:
            {{- include "tidegate.containerSecurity" . | nindent 12 }}
          volumeMounts:
            - name: tmp
              mountPath: /tmp
            {{- if .configMap }}
            - name: config
              mountPath: /etc/tidegate/hook
              readOnly: true
            {{- end }}
            {{- with .context.Values.operator.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: tmp
          emptyDir: {}
        {{- with .configMap }}
        - name: config
          configMap:
            name: {{ . }}
        {{- end }}
        {{- with .context.Values.operator.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end }}
